package loader

import (
	"errors"
	"testing"

	"metad/bpf"
)

// Neither the root's cgroup nor a tag that names no container of a task gets into the kernel.
func TestCheckContainer(t *testing.T) {
	f := func(cgroup uint64, tag uint32, ok bool) {
		t.Helper()
		if err := checkContainer(cgroup, tag); (err == nil) != ok || err != nil &&
			!errors.Is(err, ErrContainer) {
			t.Errorf("cgroup %d, tag %#x: got %v, want ok %v", cgroup, tag, err, ok)
		}
	}
	f(77, bpf.ContainerTag(1, 1), true)
	f(77, bpf.ContainerTag(bpf.TagTask, bpf.Containers), true)
	f(0, bpf.ContainerTag(1, 1), false)
	f(1, bpf.ContainerTag(1, 1), false)
	f(77, 1, false)
	f(77, bpf.ContainerTag(0, 1), false)
	f(77, bpf.TagPort|5, false)
}

// A tag holds the task and the number of the container, and both come out of it.
func TestContainerTag(t *testing.T) {
	for _, task := range []uint32{1, bpf.TagTask} {
		for _, n := range []int{1, 2, bpf.Containers} {
			tag := bpf.ContainerTag(task, n)
			if tag&bpf.TagPort != 0 || tag&bpf.TagTask != task ||
				bpf.ContainerNumber(tag) != n {
				t.Errorf("task %d, container %d: got %#x, number %d", task, n, tag,
					bpf.ContainerNumber(tag))
			}
		}
	}
}
