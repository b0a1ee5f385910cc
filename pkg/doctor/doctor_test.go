package doctor

import (
	"context"
	"errors"
	"io/fs"
	"net/netip"
	"reflect"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

var config = Config{
	Bridges: []string{"ecs-bridge", "br-*"}, Attach: "auto", PinDir: "/sys/fs/bpf/metad",
	DockerHost: "unix:///run/docker.sock", AgentURL: "http://127.0.0.1:51679",
	IntrospectionURL: "http://127.0.0.1:51678", AdminSocket: "/run/metad/admin.sock",
}

// fake is a host on which metad runs without a fault; a case changes one thing.
type fake struct {
	host
	cfg   Config
	files map[string]string
	types map[string]int64
	hook  map[int][]hook
	claim []claim
	rule  []rule
	http  map[string]string // url → body, answered with 200
	links []netlink.Link
}

func newFake() *fake {
	f := &fake{
		cfg: config,
		files: map[string]string{
			"/proc/sys/kernel/osrelease":                    "6.1.0-50-cloud-amd64\n",
			"/proc/thread-self/status":                      "Name:\tmetad\nCapPrm:\t0\nCapEff:\t000001ffffffffff\nCapBnd:\t0\n",
			"/proc/sys/net/core/bpf_jit_enable":             "1\n",
			"/sys/kernel/btf/vmlinux":                       "x",
			"/sys/fs/cgroup/cgroup.controllers":             "cpuset cpu io memory pids\n",
			"/proc/sys/net/bridge/bridge-nf-call-iptables":  "0\n",
			"/proc/sys/net/bridge/bridge-nf-call-ip6tables": "1\n",
			"/proc/sys/net/core/netdev_max_backlog":         "1000\n",
			"/proc/sys/net/ipv4/neigh/default/gc_thresh3":   "1024\n",
		},
		types: map[string]int64{"/sys/fs/bpf": unix.BPF_FS_MAGIC,
			"/sys/fs/cgroup": unix.CGROUP2_SUPER_MAGIC},
		hook: map[int][]hook{
			2: {{kind: "tc", name: "metad_bridge"}},
			3: {{kind: "tc", name: "metad_port"}},
			4: {{kind: "tc", name: "metad_port"}},
		},
		claim: []claim{
			{"metad0", netip.MustParsePrefix("169.254.170.2/32"), true},
			{"eth0", netip.MustParsePrefix("169.254.0.0/16"), true},
			{"ecs-bridge", netip.MustParsePrefix("169.254.172.0/22"), true},
		},
		http: map[string]string{
			"unix:///run/metad/admin.sock:/readyz": "ok\n",
			"unix:///run/docker.sock:/version":     `{"Version":"20.10.24","ApiVersion":"1.41"}`,
			"http://127.0.0.1:51679/":              "404 page not found",
			"http://127.0.0.1:51678/v1/metadata":   `{"Cluster":"prod","Version":"x"}`,
		},
		links: []netlink.Link{
			&netlink.Device{LinkAttrs: netlink.LinkAttrs{Name: "eth0", Index: 1}},
			&netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "ecs-bridge", Index: 2}},
			&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "veth3", Index: 3, MasterIndex: 2}},
			&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "veth4", Index: 4, MasterIndex: 2}},
			&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "metad0", Index: 5}},
			&netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "virbr0", Index: 6}},
		},
	}
	f.host = host{
		readFile: func(p string) ([]byte, error) {
			if b, ok := f.files[p]; ok {
				return []byte(b), nil
			}
			return nil, &fs.PathError{Op: "open", Path: p, Err: unix.ENOENT}
		},
		fsType: func(p string) (int64, error) {
			if t, ok := f.types[p]; ok {
				return t, nil
			}
			return 0, &fs.PathError{Op: "statfs", Path: p, Err: unix.ENOENT}
		},
		program: func() error { return nil },
		hooks:   func(i int) ([]hook, error) { return f.hook[i], nil },
		tasks: func(string) (map[netip.Addr]int, error) {
			return map[netip.Addr]int{netip.MustParseAddr("169.254.172.2"): 3}, nil
		},
		claims: func() ([]claim, error) { return f.claim, nil },
		rules:  func(context.Context, netip.Addr) ([]rule, error) { return f.rule, nil },
		get: func(_ context.Context, u string) (int, []byte, error) {
			if b, ok := f.http[u]; ok {
				return 200, []byte(b), nil
			}
			return 0, nil, unix.ECONNREFUSED
		},
	}
	f.host.links = func() ([]netlink.Link, error) { return f.links, nil }
	return f
}

func TestChecks(t *testing.T) {
	// f changes the good host. It expects one check to report that, and no other check to be
	// worse than before.
	f := func(name string, change func(*fake), check string, want Status, found string) {
		t.Helper()
		h := newFake()
		change(h)
		r := run(context.Background(), h.cfg, &h.host)
		var text strings.Builder
		r.WriteTo(&text)
		ok := false
		for _, c := range r {
			if c.Name == check && c.Status == want && strings.Contains(c.Found, found) {
				ok = true
			} else if c.Status != OK {
				t.Errorf("%s: got %v of %s, want nothing but %q:\n%s", name,
					c.Status, c.Name, check, &text)
			}
			if (c.Status != OK) != (c.Do != "") {
				t.Errorf("%s: %s: got %q to do with %v", name, c.Name, c.Do,
					c.Status)
			}
		}
		if !ok {
			t.Errorf("%s: got no %v of %s with %q in\n%s", name, want, check, found,
				&text)
		}
		if r.Status() != want {
			t.Errorf("%s: got status %v, want %v", name, r.Status(), want)
		}
	}
	with := func(path, content string) func(*fake) {
		return func(h *fake) { h.files[path] = content }
	}
	const release = "/proc/sys/kernel/osrelease"

	f("good", func(*fake) {}, "metad", OK, "runs and is ready")
	f("clsact", func(*fake) {}, "kernel", OK, "6.1.0-50-cloud-amd64, attaches by clsact")
	f("tcx", with(release, "6.6.1\n"), "kernel", OK, "attaches by tcx")
	f("tcx on a later major", with(release, "7.0.0\n"), "kernel", OK, "attaches by tcx")
	f("clsact by flag", func(h *fake) { h.files[release] = "6.12.1\n"; h.cfg.Attach = "clsact" }, "kernel", OK, "by clsact")
	f("tcx by flag, too old", func(h *fake) { h.cfg.Attach = "tcx" }, "kernel", Fail, "has no tcx")
	f("too old", func(h *fake) { h.program = func() error { return ebpf.ErrNotSupported } }, "bpf", Fail, "no bpf_redirect_peer")
	f("may not", func(h *fake) { h.program = func() error { return unix.EPERM } }, "bpf", Fail, "may not load")
	f("no bpf", func(h *fake) { h.program = func() error { return unix.ENOSYS } }, "bpf", Fail, "function not implemented")
	f("no jit", with("/proc/sys/net/core/bpf_jit_enable", "0\n"), "bpf jit", Warn, "off")

	f("all capabilities", func(*fake) {}, "capabilities", OK, "all")
	f("no capability", with("/proc/thread-self/status",
		"Name:\tx\nCapEff:\t0000000000000000\n"), "capabilities", Fail,
		"missing CAP_NET_ADMIN, CAP_SYS_ADMIN, CAP_SYS_PTRACE")
	f("Docker's default capabilities", with("/proc/thread-self/status",
		"Name:\tx\nCapEff:\t00000000a80425fb\n"), "capabilities", Fail,
		"missing CAP_NET_ADMIN, CAP_SYS_ADMIN, CAP_SYS_PTRACE")
	f("memlock matters", func(h *fake) {
		h.files[release] = "5.10.0-32\n"
		h.files["/proc/thread-self/status"] = "Name:\tx\nCapEff:\t000001fffeffffff\n"
	}, "capabilities", Fail, "missing CAP_SYS_RESOURCE")
	f("memlock no longer matters", func(h *fake) {
		h.files["/proc/thread-self/status"] = "Name:\tx\nCapEff:\t000001fffeffffff\n"
	}, "capabilities", OK, "all")

	f("no btf", func(h *fake) { delete(h.files, "/sys/kernel/btf/vmlinux") }, "btf", Warn, "no /sys/kernel/btf/vmlinux")
	f("no bpffs", func(h *fake) { h.types["/sys/fs/bpf"] = unix.SYSFS_MAGIC }, "bpffs", Fail, "not in a BPF file system")
	f("no sysfs either", func(h *fake) { delete(h.types, "/sys/fs/bpf") }, "bpffs", Fail, "no such file")
	f("pin directory elsewhere", func(h *fake) {
		h.types["/sys/fs/bpf/metad"] = unix.TMPFS_MAGIC
	}, "bpffs", Fail, "not in a BPF file system")
	f("cgroup v2", func(*fake) {}, "cgroup", OK, "v2")
	f("no memory controller", with("/sys/fs/cgroup/cgroup.controllers", "cpu io pids"), "cgroup", Warn, "v2, without memory")
	f("cgroup v1", func(h *fake) {
		h.types["/sys/fs/cgroup/unified"] = unix.CGROUP2_SUPER_MAGIC
		h.types["/sys/fs/cgroup"] = unix.TMPFS_MAGIC
		for _, c := range []string{"cpuacct", "memory", "blkio"} {
			h.types["/sys/fs/cgroup/"+c] = unix.CGROUP_SUPER_MAGIC
		}
	}, "cgroup", OK, "v1")
	f("cgroup v1 in part", func(h *fake) {
		h.types["/sys/fs/cgroup"], h.types["/sys/fs/cgroup/unified"] = unix.TMPFS_MAGIC,
			unix.CGROUP2_SUPER_MAGIC
	}, "cgroup", Warn, "v1, without cpuacct, memory, blkio")
	f("no cgroup", func(h *fake) { delete(h.types, "/sys/fs/cgroup") }, "cgroup", Warn, "no such file")
	f("proof by v2", func(*fake) {}, "which container", OK, "by cgroup v2")
	v1 := func(h *fake) {
		h.types["/sys/fs/cgroup"] = unix.TMPFS_MAGIC
		for _, c := range []string{"cpuacct", "memory", "blkio", "net_prio"} {
			h.types["/sys/fs/cgroup/"+c] = unix.CGROUP_SUPER_MAGIC
		}
	}
	f("proof on v1", v1,
		"which container", Warn, "cgroup v1 only")
	hybrid := func(h *fake) {
		v1(h)
		h.types["/sys/fs/cgroup/unified"] = unix.CGROUP2_SUPER_MAGIC
	}
	f("proof on a hybrid host", hybrid, "which container", OK, "beside v1")
	f("proof on an old hybrid host", func(h *fake) {
		hybrid(h)
		with("/proc/sys/kernel/osrelease", "5.10.0-33-amd64")(h)
	}, "which container", Warn, "beside net_prio")

	stopped := func(h *fake) {
		h.links = h.links[:4]
		h.hook = nil
		delete(h.http, "unix:///run/metad/admin.sock:/readyz")
	}
	f("not running", stopped, "metad", OK, "not running")
	f("not running: ports", stopped, "bridge ecs-bridge", OK, "2 ports")
	f("not running, another's program", func(h *fake) {
		stopped(h)
		h.hook = map[int][]hook{3: {{kind: "tc", name: "shaper"}}}
	}, "bridge ecs-bridge", OK, `2 ports; other programs: tc "shaper" on veth3`)
	f("hangs", func(h *fake) { delete(h.http, "unix:///run/metad/admin.sock:/readyz") }, "metad", Warn, "does not answer")
	f("other namespace", func(h *fake) { h.links = h.links[:4] }, "metad", Fail, "there is no metad0")
	f("not ready", func(h *fake) {
		get := h.get
		h.get = func(ctx context.Context, u string) (int, []byte, error) {
			if strings.HasSuffix(u, "/readyz") {
				return 503, []byte("docker has not answered yet\n"), nil
			}
			return get(ctx, u)
		}
	}, "metad", Fail, "not ready: docker has not answered yet")

	f("no bridge", func(h *fake) { h.cfg.Bridges = []string{"cni0"} }, "bridges", Warn, "none matches cni0")
	f("ports", func(*fake) {}, "bridge ecs-bridge", OK, "2 ports, all with metad's program")
	f("port that is no veth", func(h *fake) {
		h.links = append(h.links, &netlink.Device{LinkAttrs: netlink.LinkAttrs{Name: "eth1",
			Index: 9, MasterIndex: 2}})
	}, "bridge ecs-bridge", OK, "2 ports, all")
	f("port without", func(h *fake) { delete(h.hook, 4) }, "bridge ecs-bridge", Warn, "1 of 2 ports without metad's program: veth4")
	f("another after ours", func(h *fake) {
		h.hook[4] = append(h.hook[4], hook{kind: "tc", name: "cil_from_container"})
	}, "bridge ecs-bridge", OK, `other programs: tc "cil_from_container" on veth4`)
	f("another before ours", func(h *fake) {
		h.hook[4] = []hook{{kind: "tcx", name: "shaper"}, {kind: "tcx", name: "metad_port"}}
	}, "bridge ecs-bridge", Warn, `tcx "shaper" runs before metad on veth4`)
	f("xdp is before everything", func(h *fake) {
		h.hook[4] = []hook{{kind: "xdp", name: "metadrop"},
			{kind: "tc", name: "metad_port"}}
	}, "bridge ecs-bridge", Warn, `xdp "metadrop" runs before metad on veth4`)
	f("hooks not seen", func(h *fake) {
		h.host.hooks = func(int) ([]hook, error) {
			return nil, errors.New("tc filters of \"veth3\": broken")
		}
	}, "bridge ecs-bridge", Warn, "broken")
	f("port gone meanwhile", func(h *fake) {
		h.links = append(h.links, &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "veth9",
			Index: 9, MasterIndex: 2}})
		h.host.hooks = func(i int) ([]hook, error) {
			if i == 9 {
				return nil, netlink.LinkNotFoundError{}
			}
			return h.hook[i], nil
		}
	}, "bridge ecs-bridge", OK, "all with metad's program")

	f("port that ties two bridges", func(h *fake) {
		h.links = append(h.links, &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "tie",
			Index: 9, MasterIndex: 2, NetNsID: -1, ParentIndex: 10}},
			&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "end", Index: 10,
				MasterIndex: 6, NetNsID: -1, ParentIndex: 9}})
	}, "bridge ecs-bridge", OK, "2 ports, all")

	f("tasks", func(*fake) {}, "tasks", OK, "1 addresses, all behind")
	f("task on a bridge that is not watched", func(h *fake) {
		h.links = append(h.links, &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "veth9",
			Index: 9, MasterIndex: 6}})
		h.tasks = func(string) (map[netip.Addr]int, error) {
			return map[netip.Addr]int{netip.MustParseAddr("10.9.0.2"): 9,
				netip.MustParseAddr("169.254.172.2"): 3}, nil
		}
	}, "tasks", Warn,
		"1 of 2 addresses behind a device without metad's program: 10.9.0.2 on veth9")
	f("no map of tasks", func(h *fake) {
		h.tasks = func(string) (map[netip.Addr]int, error) { return nil, unix.EACCES }
	}, "tasks", Warn, "permission denied")
	crowd := func(n int) func(*fake) {
		return func(h *fake) {
			for i := range n {
				h.links = append(h.links,
					&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "v",
						Index: 100 + i, MasterIndex: 6}})
			}
		}
	}
	f("room", crowd(450), "crowd", OK, "452 ports")
	f("a crowd", crowd(501), "crowd", Warn, "501 ports of one bridge, and net.core.netdev_max_backlog is 1000")
	f("a crowd of neighbours", func(h *fake) {
		crowd(511)(h)
		h.files["/proc/sys/net/core/netdev_max_backlog"] = "8192\n"
	}, "crowd", Warn, "513 ports of all bridges, and net.ipv4.neigh.default.gc_thresh3 is 1024")
	f("neighbours not seen", func(h *fake) {
		crowd(511)(h)
		h.files["/proc/sys/net/core/netdev_max_backlog"] = "8192\n"
		delete(h.files, "/proc/sys/net/ipv4/neigh/default/gc_thresh3")
	}, "crowd", OK, "513 ports")

	f("no br_netfilter", func(h *fake) { delete(h.files, "/proc/sys/net/bridge/bridge-nf-call-iptables") }, "br_netfilter", OK, "off")
	f("br_netfilter", with("/proc/sys/net/bridge/bridge-nf-call-iptables", "1\n"), "br_netfilter", OK, "on")

	f("address free", func(*fake) {}, "address", OK, "is free")
	f("address taken", func(h *fake) {
		h.claim = append(h.claim, claim{"lo", netip.MustParsePrefix("169.254.170.2/32"),
			false})
	}, "address", Warn, "lo has 169.254.170.2")
	f("network of the local endpoints container", func(h *fake) {
		h.claim = append(h.claim,
			claim{"br-12ab", netip.MustParsePrefix("169.254.170.0/24"), true})
	}, "address", Warn, "169.254.170.0/24 is a network of br-12ab")

	rules := func(chain, text string) func(*fake) {
		return func(h *fake) { h.rule = []rule{{chain, text}} }
	}
	f("agent's rule", rules("ip nat PREROUTING", "ip daddr 169.254.170.2 dnat to 127.0.0.1:51679"), "rules", OK, "while metad does not run")
	f("agent's other rule", rules("ip nat OUTPUT", "ip daddr 169.254.170.2 redirect to :51679"), "rules", OK, "host processes go there")
	f("dropped", rules("ip filter FORWARD", "-A FORWARD -d 169.254.170.2/32 -j DROP"), "rules", Warn, "FORWARD")
	f("no tool", func(h *fake) {
		h.rules = nil
		h.host.rules = func(context.Context, netip.Addr) ([]rule, error) {
			return nil, errors.New("nft: not found")
		}
	}, "rules", Warn, "nft: not found")

	f("docker", func(*fake) {}, "docker", OK, "20.10.24, API 1.41 at unix:///run/docker.sock")
	f("docker by tcp", func(h *fake) {
		h.cfg.DockerHost = "tcp://127.0.0.1:2375"
		h.http["http://127.0.0.1:2375/version"] = `{"Version":"28.5.2","ApiVersion":"1.51"}`
	}, "docker", OK, "28.5.2, API 1.51")
	const info = "unix:///run/docker.sock:/info"
	nri := func(body, metrics string) func(h *fake) {
		return func(h *fake) {
			h.cfg.NRISocket = "/var/run/nri/nri.sock"
			h.http[info] = body
			h.http["unix:///run/metad/admin.sock:/metrics"] = metrics
		}
	}
	f("nri: too old", nri(`{"ServerVersion":"28.5.2+dfsg4"}`, ""), "nri", OK, "28.5.2+dfsg4 has none")
	f("nri: off", nri(`{"ServerVersion":"29.2.0"}`, ""), "nri", OK, "off")
	f("nri: without a socket", nri(`{"ServerVersion":"29.6","NRI":{"Info":[["plugin-path","/x"]]}}`, ""), "nri", OK, "off")
	const on = `{"ServerVersion":"29.6","NRI":{"Info":[["plugin-path","/x"],["socket-path","/var/run/nri/nri.sock"]]}}`
	f("nri: on", nri(on, "metad_nri_connected 1\n"), "nri", OK, "on, at /var/run/nri/nri.sock")
	f("nri: not connected", nri(on, "metad_nri_connected 0\n"), "nri", Warn, "not connected")
	f("nri: elsewhere", nri(`{"ServerVersion":"29.6","NRI":{"Info":[["socket-path","/run/nri.sock"]]}}`, ""), "nri", Warn, "/run/nri.sock, metad looks for")
	f("no docker", func(h *fake) { delete(h.http, "unix:///run/docker.sock:/version") }, "docker", Fail, "connection refused")
	f("not docker", func(h *fake) { h.http["unix:///run/docker.sock:/version"] = "<html>" }, "docker", Fail, "no Docker Engine")

	f("agent", func(*fake) {}, "agent", OK, `at http://127.0.0.1:51679, cluster "prod"`)
	f("no agent", func(h *fake) {
		delete(h.http, "http://127.0.0.1:51679/")
		delete(h.http, "http://127.0.0.1:51678/v1/metadata")
	}, "agent", OK, "none at http://127.0.0.1:51679")
	f("half an agent", func(h *fake) { delete(h.http, "http://127.0.0.1:51679/") }, "agent", Fail, `cluster "prod", but`)
	f("the other half", func(h *fake) { delete(h.http, "http://127.0.0.1:51678/v1/metadata") }, "agent", Warn, "51678 does not")
	f("agent off", func(h *fake) { h.cfg.AgentURL = "" }, "agent", OK, "switched off")
}

func TestReport(t *testing.T) {
	r := Report{{"kernel", OK, "6.1", ""}, {"bridges", Warn, "none", "make one"}}
	const want = "" +
		"ok    kernel   6.1\n" +
		"warn  bridges  none\n" +
		"               → make one\n"
	var b strings.Builder
	if n, err := r.WriteTo(&b); err != nil || b.String() != want || int(n) != len(want) {
		t.Errorf("got %d, %v\n%swant\n%s", n, err, &b, want)
	}
	f := func(r Report, want int) {
		t.Helper()
		if got := int(r.Status()); got != want {
			t.Errorf("%v: got exit code %d, want %d", r, got, want)
		}
	}
	f(nil, 0)
	f(r, 1)
	f(Report{{Status: Fail}, {Status: Warn}}, 2)
}

func TestParseRules(t *testing.T) {
	f := func(in string, want ...rule) {
		t.Helper()
		if got := parseRules([]byte(in), endpoint); !reflect.DeepEqual(got, want) {
			t.Errorf("got %q, want %q, of\n%s", got, want, in)
		}
	}
	f("")
	f("table ip nat {\n\tchain PREROUTING {\n\t\ttype nat hook prerouting priority dstnat; "+
		"policy accept;\n"+
		"\t\tmeta l4proto tcp ip daddr 169.254.170.2 tcp dport 80 counter packets 0 "+
		"bytes 0 dnat to 127.0.0.1:51679\n\t}\n\n"+
		"\tchain OUTPUT {\n\t\tip daddr { 10.0.0.1, 169.254.170.2 } drop\n\t}\n}\n",
		rule{"ip nat PREROUTING",
			"meta l4proto tcp ip daddr 169.254.170.2 tcp dport 80 counter packets 0 " +
				"bytes 0 dnat to 127.0.0.1:51679"},
		rule{"ip nat OUTPUT", "ip daddr { 10.0.0.1, 169.254.170.2 } drop"})
	f("*nat\n:PREROUTING ACCEPT [0:0]\n-A PREROUTING -d 169.254.170.2/32 -p tcp -j "+
		"DNAT\nCOMMIT\n*filter\n-A FORWARD -d 169.254.169.254/32 -j DROP\n-A FORWARD -d "+
		"169.254.0.0/16 -j DROP\nCOMMIT\n",
		rule{"ip nat PREROUTING", "-A PREROUTING -d 169.254.170.2/32 -p tcp -j DNAT"},
		rule{"ip filter FORWARD", "-A FORWARD -d 169.254.0.0/16 -j DROP"})
	f("table inet x {\n chain y {\n ip daddr 0.0.0.0/0 accept\n ip daddr 169.254.170.20 "+
		"drop\n ip saddr != 169.254.170.3/31 drop\n }\n}\n",
		rule{"inet x y", "ip saddr != 169.254.170.3/31 drop"})
}
