"""Ray's cluster launcher (`ray up`): machines on AWS, or machines that are there."""
