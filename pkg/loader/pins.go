package loader

import (
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/cilium/ebpf"
	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"metad/bpf"
)

// pinned are the maps that outlive the process. The program array must never be one of them: when
// the process dies, the kernel empties the array, and only then the hooks leave packets alone.
var pinned = []string{
	bpf.MetadMapIpTask, bpf.MetadMapContainerCgroup, bpf.MetadMapHostCgroup,
	bpf.MetadMapNeighbours, bpf.MetadMapPortNeighbours, bpf.MetadMapCounters,
	bpf.MetadMapVerdicts,
}

func pinName(name string, layout uint32) string {
	return name + "_v" + strconv.FormatUint(uint64(layout), 10)
}

// makePinDir makes dir if it is missing, and checks its owner and that it is on a BPF file system.
func makePinDir(dir string) error {
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("pin directory: %w", err)
	}
	if err := checkOwner(dir, os.Geteuid()); err != nil {
		return err
	}
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return fmt.Errorf("pin directory %s: %w", dir, err)
	}
	if st.Type != unix.BPF_FS_MAGIC {
		_ = os.Remove(dir) // probably made above; fails if it has files
		return fmt.Errorf("pin directory %s: %w", dir, ErrNoBPFFS)
	}
	return nil
}

// checkOwner refuses a directory that another user owns or may write to: that user could remove
// pins and hold the lock. The check is needed because in a file system that `mount -t bpf` made,
// every user may make directories.
func checkOwner(dir string, uid int) error {
	var st unix.Stat_t
	if err := unix.Lstat(dir, &st); err != nil {
		return fmt.Errorf("pin directory %s: %w", dir, err)
	}
	switch {
	case st.Mode&unix.S_IFMT != unix.S_IFDIR:
		return fmt.Errorf("%w: %s is not a directory", ErrPinDir, dir)
	case st.Uid != uint32(uid):
		return fmt.Errorf("%w: %s belongs to uid %d, not to uid %d: remove it", ErrPinDir,
			dir, st.Uid, uid)
	case st.Mode&0o077 != 0:
		return fmt.Errorf("%w: %s has mode %#o, not 0700: chmod it", ErrPinDir, dir,
			st.Mode&0o777)
	}
	return nil
}

// openPinned returns the pinned map if it is as spec describes. Otherwise it pins a new map in its
// place. It also removes the map's pins of other layouts. It logs each pin that it removes.
func openPinned(spec *ebpf.MapSpec, dir string, layout uint32, log *zap.Logger) (*ebpf.Map, error) {
	path := filepath.Join(dir, pinName(spec.Name, layout))
	if err := removeOtherLayouts(dir, spec.Name, filepath.Base(path), log); err != nil {
		return nil, err
	}
	m, err := ebpf.LoadPinnedMap(path, nil)
	if err == nil {
		if err = spec.Compatible(m); err == nil {
			return m, nil
		}
		m.Close()
	}
	if !errors.Is(err, fs.ErrNotExist) {
		log.Warn("pinned map has another layout: replacing it with an empty one",
			zap.String("path", path), zap.Error(err))
		if err := os.RemoveAll(path); err != nil {
			return nil, fmt.Errorf("remove %s: %w", path, err)
		}
	}
	if m, err = ebpf.NewMap(spec); err != nil {
		return nil, fmt.Errorf("make map %s: %w", spec.Name, err)
	}
	if err := m.Pin(path); err != nil {
		m.Close()
		return nil, fmt.Errorf("pin %s: %w", path, err)
	}
	return m, nil
}

func removeOtherLayouts(dir, name, keep string, log *zap.Logger) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return fmt.Errorf("pin directory: %w", err)
	}
	for _, e := range entries {
		if e.Name() == keep || !isPinOf(e.Name(), name) {
			continue
		}
		path := filepath.Join(dir, e.Name())
		log.Warn("removing a pinned map of another layout", zap.String("path", path))
		if err := os.RemoveAll(path); err != nil {
			return fmt.Errorf("remove %s: %w", path, err)
		}
	}
	return nil
}

// isPinOf reports whether file is a pin of the map in any layout.
func isPinOf(file, name string) bool {
	v, ok := strings.CutPrefix(file, name+"_v")
	_, err := strconv.ParseUint(v, 10, 32)
	return ok && err == nil
}

// PinnedTasks returns the addresses in the map of tasks that is pinned in dir, with the ifindex of
// the device of each. It returns none if there is no such map.
func PinnedTasks(dir string) (map[netip.Addr]int, error) {
	layout, err := LayoutVersion()
	if err != nil {
		return nil, err
	}
	m, err := ebpf.LoadPinnedMap(filepath.Join(dir, pinName(bpf.MetadMapIpTask, layout)),
		&ebpf.LoadPinOptions{ReadOnly: true})
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", bpf.MetadMapIpTask, err)
	}
	defer m.Close()
	entries, err := kernelMap[bpf.TaskValue]{m}.all()
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", bpf.MetadMapIpTask, err)
	}
	behind := make(map[netip.Addr]int, len(entries))
	for addr, v := range entries {
		behind[addr] = int(v.Ifindex)
	}
	return behind, nil
}

// removePins removes metad's pins of every layout, and the directory if it is empty after that.
func removePins(dir string) error {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("pin directory: %w", err)
	}
	var errs []error
	for _, e := range entries {
		for _, name := range pinned {
			if isPinOf(e.Name(), name) {
				errs = append(errs, os.RemoveAll(filepath.Join(dir, e.Name())))
			}
		}
	}
	if err := os.Remove(dir); err != nil && !errors.Is(err, unix.ENOTEMPTY) {
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}
