"""KubeRay: a RayJob or a RayCluster with a group of pods for each role, and what belongs to it."""
