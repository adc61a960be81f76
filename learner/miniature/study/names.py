"""Names of policies that several parts have."""

BASE = "base"
INSTANCE_ONLY = "instance only"
LOO_FID_ONLY = "LOO-FID only"
JOINT_ONLY = "joint LOO-FID only"
BOTH = "instance + LOO-FID"
WITH_ENTROPY = "both + entropy"
WITH_JOINT = "instance + joint LOO-FID"
