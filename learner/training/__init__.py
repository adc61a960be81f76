"""The learner role: policy, optimizer, passes, data parallelism."""
