package docker

import "metad/pkg/task"

// Identify returns the task that a container with these labels and this name (no slash) will belong to once
// it is created, and the container as far as that says: both without what only the Engine can
// know. It returns nil if the container will be a task of its own, whose ARN is made of the id it does not
// have yet. Safe for concurrent use.
func (f *Follower) Identify(labels map[string]string, name string) (*task.Task, *task.Container) {
	d := &description{container: task.Container{Labels: labels, DockerName: name, Type: task.TypeNormal}}
	d.identify(f.names)
	if d.id == "" {
		return nil, nil
	}
	t := &task.Task{ID: d.id, ARN: d.arn, Cluster: d.cluster, Family: d.family, Revision: d.revision,
		AvailabilityZone: f.cfg.AvailabilityZone}
	return t, &d.container
}
