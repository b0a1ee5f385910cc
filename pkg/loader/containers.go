package loader

import (
	"errors"
	"fmt"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"metad/bpf"
)

// ErrContainer means that the cgroup or the tag of an entry is not one container's alone.
var ErrContainer = errors.New("not a container's own cgroup or tag")

// rootCgroup is the id of the root of cgroup v2, which every socket has where v2 says nothing.
const rootCgroup = 1

// PutContainer gives packets whose socket was made in the cgroup, or below it, the container's tag:
// v.Tag is bpf.ContainerTag of the task's tag. The kernel gives it only to packets that come from
// an address of that very task (Put) whose TaskValue.Levels has the cgroup's depth: 2 for
// /docker/<id> and /system.slice/docker-<id>.scope, 3 for ECS. cgroup is the inode number of the
// cgroup's directory (v2), of a directory that is this container's alone.
//
// A cgroup that is gone does no harm: its id is not given again before a reboot. The map is pinned;
// see Containers. Errors: ErrContainer, ErrFull.
func (l *Loader) PutContainer(cgroup uint64, v *bpf.ContainerValue) error {
	return putContainer(l.progs.ContainerCgroup, cgroup, v)
}

// PutHostContainer is PutContainer for a container in the host's network. Such a container reaches
// the endpoint by the host's route, and no address identifies it. So its task needs no Put, but it
// needs a tag. The kernel looks for the cgroup at the depths Config.HostLevels.
func (l *Loader) PutHostContainer(cgroup uint64, v *bpf.ContainerValue) error {
	return putContainer(l.progs.HostCgroup, cgroup, v)
}

// DeleteContainer deletes the cgroup from both maps. It is no error if neither has it.
func (l *Loader) DeleteContainer(cgroup uint64) error {
	var errs []error
	for _, m := range []*ebpf.Map{l.progs.ContainerCgroup, l.progs.HostCgroup} {
		if err := m.Delete(&cgroup); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			errs = append(errs, fmt.Errorf("delete container cgroup %d: %w", cgroup,
				err))
		}
	}
	return errors.Join(errs...)
}

// Containers returns the entries of both maps, by cgroup: own has the containers with an address,
// host those in the host's network. After a start the entries are those of an earlier process.
// Delete the ones whose container is gone.
func (l *Loader) Containers() (own, host map[uint64]bpf.ContainerValue, err error) {
	own, err = readContainers(l.progs.ContainerCgroup)
	if err != nil {
		return nil, nil, fmt.Errorf("read %s: %w", bpf.MetadMapContainerCgroup, err)
	}
	host, err = readContainers(l.progs.HostCgroup)
	if err != nil {
		return nil, nil, fmt.Errorf("read %s: %w", bpf.MetadMapHostCgroup, err)
	}
	return own, host, nil
}

func putContainer(m *ebpf.Map, cgroup uint64, v *bpf.ContainerValue) error {
	if err := checkContainer(cgroup, v.Tag); err != nil {
		return err
	}
	if err := m.Put(&cgroup, v); errors.Is(err, unix.E2BIG) {
		return fmt.Errorf("put container cgroup %d: %d entries: %w", cgroup, m.MaxEntries(),
			ErrFull)
	} else if err != nil {
		return fmt.Errorf("put container cgroup %d: %w", cgroup, err)
	}
	return nil
}

// checkContainer refuses an entry that could name a container that did not send the packet.
func checkContainer(cgroup uint64, tag uint32) error {
	switch {
	case cgroup <= rootCgroup:
		return fmt.Errorf("%w: cgroup %d", ErrContainer, cgroup)
	case tag&bpf.TagPort != 0, tag&bpf.TagTask == 0, tag&bpf.TagContainer == 0:
		return fmt.Errorf("%w: tag %#x", ErrContainer, tag)
	}
	return nil
}

func readContainers(m *ebpf.Map) (map[uint64]bpf.ContainerValue, error) {
	all := map[uint64]bpf.ContainerValue{}
	var cgroup uint64
	var v bpf.ContainerValue
	it := m.Iterate()
	for it.Next(&cgroup, &v) {
		all[cgroup] = v
	}
	return all, it.Err()
}
