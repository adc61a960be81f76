"""Learning: the GRPO learner, the main loop, configuration, evaluation and the run directory."""
