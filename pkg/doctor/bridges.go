package doctor

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"path"
	"slices"
	"strconv"
	"strings"

	"github.com/vishvananda/netlink"
)

func find(links []netlink.Link, name string) netlink.Link {
	for _, l := range links {
		if l.Attrs().Name == name {
			return l
		}
	}
	return nil
}

// checkBridges looks at every watched bridge, its ports, and other programs on them.
func checkBridges(_ context.Context, cfg Config, h *host) []Check {
	links, err := h.links()
	if err != nil {
		return one("bridges", Fail, "list interfaces: "+err.Error(), "")
	}
	running := find(links, hostEnd) != nil
	var checks []Check
	for _, l := range links {
		if l.Type() == "bridge" && matches(cfg.Bridges, l.Attrs().Name) {
			checks = append(checks, checkBridge(l, links, running, h)...)
		}
	}
	if checks == nil {
		return one("bridges", Warn, "none matches "+strings.Join(cfg.Bridges, ", "),
			"metad finds a bridge when it comes; if yours have other names, set "+
				"--bridges")
	}
	return checks
}

func matches(patterns []string, name string) bool {
	for _, p := range patterns {
		if ok, err := path.Match(p, name); ok && err == nil {
			return true
		}
	}
	return false
}

func checkBridge(bridge netlink.Link, links []netlink.Link, running bool, h *host) []Check {
	name := "bridge " + bridge.Attrs().Name
	var without, other []string
	ports := 0
	var checks []Check
	for _, l := range links {
		port := isPort(l, bridge, links)
		if !port && l != bridge {
			continue
		}
		if port {
			ports++
		}
		hooks, err := h.hooks(l.Attrs().Index)
		if errors.As(err, new(netlink.LinkNotFoundError)) {
			continue // gone since the list was made
		}
		if err != nil {
			checks = append(checks, Check{name, Warn, err.Error(), "run as root"})
			continue
		}
		ours := slices.IndexFunc(hooks, hook.ours)
		for i, k := range hooks {
			if i == ours {
				continue
			}
			if i > ours { // after metad's, or there is none
				other = append(other, k.String()+" on "+l.Attrs().Name)
				continue
			}
			checks = append(checks,
				Check{name, Warn, fmt.Sprintf("%s runs before metad on %s", k,
					l.Attrs().Name),
					"it must let TCP for 169.254.170.2:80 pass " +
						"(TC_ACT_UNSPEC, XDP_PASS), or no request of " +
						"this container arrives"})
		}
		if port && ours < 0 {
			without = append(without, l.Attrs().Name)
		}
	}
	summary := Check{Name: name, Found: fmt.Sprintf("%d ports, all with metad's program",
		ports)}
	switch {
	case !running:
		summary.Found = fmt.Sprintf("%d ports", ports)
	case len(without) > 0:
		summary.Status = Warn
		summary.Found = fmt.Sprintf("%d of %d ports without metad's program: %s",
			len(without), ports, list(without))
		summary.Do = "a new port has it within a second; otherwise metad's log has the " +
			"error"
	}
	if other != nil {
		summary.Found += "; other programs: " + list(other)
	}
	return append([]Check{summary}, checks...)
}

// isPort reports whether metad would attach to l as a port of the bridge: l is a veth whose other
// end is in another network namespace, or on its way there and not in use here.
func isPort(l, bridge netlink.Link, links []netlink.Link) bool {
	a := l.Attrs()
	if a.MasterIndex != bridge.Attrs().Index || l.Type() != "veth" {
		return false
	}
	if a.NetNsID >= 0 || a.ParentIndex == 0 {
		return true
	}
	return !slices.ContainsFunc(links, func(end netlink.Link) bool {
		e := end.Attrs()
		return e.Index == a.ParentIndex && (e.Flags&net.FlagUp != 0 || e.MasterIndex != 0)
	})
}

// checkUnwatched looks for known tasks whose packets metad does not see.
func checkUnwatched(_ context.Context, cfg Config, h *host) []Check {
	const name = "tasks"
	links, err := h.links()
	if err != nil || find(links, hostEnd) == nil {
		return nil // checkRunning tells
	}
	behind, err := h.tasks(cfg.PinDir)
	if err != nil {
		return one(name, Warn, err.Error(), "run as root")
	}
	var unwatched []string
	for _, addr := range slices.SortedFunc(maps.Keys(behind), netip.Addr.Compare) {
		hooks, err := h.hooks(behind[addr])
		if err == nil && !slices.ContainsFunc(hooks, hook.ours) {
			unwatched = append(unwatched, fmt.Sprintf("%s on %s", addr,
				nameOf(links, behind[addr])))
		}
	}
	if unwatched != nil {
		return one(name, Warn,
			fmt.Sprintf(
				"%d of %d addresses behind a device without metad's program: %s",
				len(unwatched), len(behind), list(unwatched)),
			"their requests are refused or go to the agent; name the bridge: --bridges")
	}
	return one(name, OK, fmt.Sprintf("%d addresses, all behind ports with metad's program",
		len(behind)), "")
}

func nameOf(links []netlink.Link, ifindex int) string {
	for _, l := range links {
		if l.Attrs().Index == ifindex {
			return l.Attrs().Name
		}
	}
	return fmt.Sprintf("device %d", ifindex)
}

// checkCrowd compares the number of ports with two limits of the host. A broadcast (ARP for the
// gateway) puts one packet for each port of its bridge into the backlog of one CPU
// (net.core.netdev_max_backlog). Each container that the host sends to is an entry of the
// neighbour table (gc_thresh3). A packet that does not fit is lost, and its sender waits a second
// before it tries again.
func checkCrowd(_ context.Context, _ Config, h *host) []Check {
	links, err := h.links()
	if err != nil {
		return nil // checkBridges tells
	}
	all, most := 0, 0
	for _, bridge := range links {
		n := 0
		for _, l := range links {
			if bridge.Type() == "bridge" && isPort(l, bridge, links) {
				n++
			}
		}
		all, most = all+n, max(most, n)
	}
	var checks []Check
	for _, c := range []struct {
		sysctl, ports string
		need          int
	}{
		{"net.core.netdev_max_backlog", "ports of one bridge", most},
		{"net.ipv4.neigh.default.gc_thresh3", "ports of all bridges", all},
	} {
		b, err := h.readFile("/proc/sys/" + strings.ReplaceAll(c.sysctl, ".", "/"))
		if err != nil {
			continue // gc_thresh3 is the first network namespace's only
		}
		has, err := strconv.Atoi(strings.TrimSpace(string(b)))
		const room = 2 // times: others use them too
		if err != nil || has >= room*c.need {
			continue
		}
		set := 1
		for set < 2*room*c.need {
			set *= 2
		}
		checks = append(checks, Check{"crowd", Warn, fmt.Sprintf("%d %s, and %s is %d",
			c.need, c.ports, c.sysctl, has),
			fmt.Sprintf("requests wait a second now and then: sysctl -w %s=%d",
				c.sysctl, set)})
	}
	if checks == nil {
		return one("crowd", OK, fmt.Sprintf("%d ports, room for them", all), "")
	}
	return checks
}

// checkBridgeNetfilter reports br_netfilter. With it the host's iptables see the packets that
// cross a bridge, after the port's tc hook and before the bridge device's.
func checkBridgeNetfilter(_ context.Context, _ Config, h *host) []Check {
	const name = "br_netfilter"
	b, err := h.readFile("/proc/sys/net/bridge/bridge-nf-call-iptables")
	if err != nil || strings.TrimSpace(string(b)) == "0" {
		return one(name, OK, "off", "")
	}
	return one(name, OK, "on: on a port without metad's program the host's rules come first",
		"")
}
