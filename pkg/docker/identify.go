package docker

import "metad/pkg/task"

// Identify returns the task that a container with these labels and this name (no leading slash)
// will belong to, and the container, as far as both are known before the Engine creates it. They
// are nil if it will be a task of its own, whose id is made of the container's. Safe for
// concurrent use.
func (f *Follower) Identify(labels map[string]string, name string) (*task.Task, *task.Container) {
	return f.state.names.expect(labels, name)
}

// expect implements Identify.
func (n *naming) expect(labels map[string]string, name string) (*task.Task, *task.Container) {
	d := &description{container: task.Container{DockerName: name, Labels: labels}}
	d.identify(n)
	if d.id == "" {
		return nil, nil
	}
	return &task.Task{ID: d.id, ARN: d.arn, Cluster: d.cluster, Family: d.family,
		Revision: d.revision}, &d.container
}
