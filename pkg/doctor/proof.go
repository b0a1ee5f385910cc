package doctor

import (
	"context"

	"golang.org/x/sys/unix"
)

// checkProof reports how metad identifies a container that shares its network with others: by its
// cgroup (v2), or not at all.
func checkProof(_ context.Context, _ Config, h *host) []Check {
	const name, root = "which container", "/sys/fs/cgroup"
	const unproved = "containers with the same address are not told apart, and those on the " +
		"host's network are no task"
	isV2 := func(dir string) bool {
		t, err := h.fsType(dir)
		return err == nil && t == unix.CGROUP2_SUPER_MAGIC
	}
	if _, err := h.fsType(root); err != nil {
		return nil // checkCgroup tells
	}
	if isV2(root) {
		return one(name, OK, "the kernel tells, by cgroup v2", "")
	}
	if !isV2(root + "/unified") {
		return one(name, Warn, "cgroup v1 only: "+unproved,
			"boot with systemd.unified_cgroup_hierarchy=1")
	}
	// Until Linux 5.15 a socket has either a v2 cgroup or a v1 class. Once any process of the
	// host has a class, no new socket has a v2 cgroup (Linux commit 8520e224f547).
	if _, major, minor, err := kernel(h); err == nil &&
		(major < 5 || major == 5 && minor < 15) {
		for _, c := range []string{"net_cls", "net_prio", "net_cls,net_prio"} {
			if _, err := h.fsType(root + "/" + c); err == nil {
				return one(name, Warn,
					"cgroup v2 beside "+c+": from its first use on "+unproved,
					"boot with systemd.unified_cgroup_hierarchy=1, or run "+
						"Linux 5.15 or later")
			}
		}
	}
	return one(name, OK, "the kernel tells, by cgroup v2 beside v1", "")
}
