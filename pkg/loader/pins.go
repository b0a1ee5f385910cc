package loader

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/cilium/ebpf"
	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"metad/bpf"
)

// pinned are the maps that outlive the process. The program array is not one of them, ever: emptying
// it at the process's death is what opens the ports again.
var pinned = []string{bpf.MetadMapIpTask, bpf.MetadMapNeighbours, bpf.MetadMapCounters, bpf.MetadMapVerdicts}

func pinName(name string, layout uint32) string {
	return name + "_v" + strconv.FormatUint(uint64(layout), 10)
}

// makePinDir makes dir if need be and checks that it is on a BPF file system.
func makePinDir(dir string) error {
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("pin directory: %w", err)
	}
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return fmt.Errorf("pin directory %s: %w", dir, err)
	}
	if st.Type != unix.BPF_FS_MAGIC {
		_ = os.Remove(dir) // if we have just made it, in the wrong place
		return fmt.Errorf("pin directory %s: %w", dir, ErrNoBPFFS)
	}
	return nil
}

// openPinned returns the pinned map if it is what spec describes. Whatever else is in its place,
// and every other layout's pin of the map, is removed with a log line, and a new map is pinned.
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
		log.Warn("pinned map is not of this layout: starting with an empty one", zap.String("path", path), zap.Error(err))
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

// removePins removes all our pins, of every layout, and the directory if that leaves it empty.
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
