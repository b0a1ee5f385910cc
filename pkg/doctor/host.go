package doctor

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"os/exec"
	"slices"
	"strings"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/features"
	"github.com/cilium/ebpf/link"
	"github.com/cilium/ebpf/rlimit"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"metad/pkg/loader"
	"metad/pkg/netdump"
)

// host is where the checks get their facts; a test has a fake one.
type host struct {
	readFile func(path string) ([]byte, error)
	fsType   func(path string) (int64, error) // statfs(2)'s f_type
	// program loads a tc program that calls bpf_redirect_peer.
	program func() error
	links   func() ([]netlink.Link, error)
	// hooks returns the programs at an interface's ingress, in the order in which they run.
	hooks func(ifindex int) ([]hook, error)
	// tasks returns the addresses in the pinned map of tasks, with the ifindex of their ports.
	tasks func(pinDir string) (map[netip.Addr]int, error)
	// claims returns the addresses and routes of the host's interfaces: one of them may claim
	// 169.254.170.2.
	claims func() ([]claim, error)
	// rules returns the firewall's rules that name addr or a network with it. A tool that is
	// not installed is skipped; without any tool it returns an error.
	rules func(ctx context.Context, addr netip.Addr) ([]rule, error)
	// get returns the body of an HTTP answer, whatever its status; url may be
	// "unix:///socket/path:/url/path".
	get func(ctx context.Context, url string) (status int, body []byte, err error)
}

// hook is one program at an interface's ingress.
type hook struct {
	kind string // "xdp", "tcx" or "tc"
	name string
}

func (h hook) ours() bool { return h.kind != "xdp" && strings.HasPrefix(h.name, "metad") }

func (h hook) String() string { return fmt.Sprintf("%s %q", h.kind, h.name) }

// claim is an address of an interface, or a route out of it.
type claim struct {
	iface string
	what  netip.Prefix
	route bool
}

// rule is one line of a firewall.
type rule struct {
	chain string // "ip nat PREROUTING"
	text  string
}

const askFor = 2 * time.Second

func thisHost() *host {
	return &host{
		readFile: os.ReadFile,
		fsType: func(path string) (int64, error) {
			var st unix.Statfs_t
			if err := unix.Statfs(path, &st); err != nil {
				return 0, fmt.Errorf("statfs %q: %w", path, err)
			}
			return int64(st.Type), nil
		},
		program: func() error {
			// Before Linux 5.11 BPF objects count against RLIMIT_MEMLOCK. If this
			// fails, so does the load.
			_ = rlimit.RemoveMemlock()
			return features.HaveProgramHelper(ebpf.SchedCLS, asm.FnRedirectPeer)
		},
		links:  func() ([]netlink.Link, error) { return netdump.Whole(netlink.LinkList) },
		hooks:  ingressHooks,
		tasks:  loader.PinnedTasks,
		claims: claims,
		rules:  rules,
		get:    get,
	}
}

func ingressHooks(ifindex int) ([]hook, error) {
	l, err := netlink.LinkByIndex(ifindex)
	if err != nil {
		return nil, fmt.Errorf("interface %d: %w", ifindex, err)
	}
	var hooks []hook
	if x := l.Attrs().Xdp; x != nil && x.Attached {
		hooks = append(hooks,
			hook{kind: "xdp", name: programName(ebpf.ProgramID(x.ProgId))})
	}
	// Kernels before 6.6 have no TCX.
	q, err := link.QueryPrograms(link.QueryOptions{Target: ifindex,
		Attach: ebpf.AttachTCXIngress})
	if err != nil && !errors.Is(err, ebpf.ErrNotSupported) && !errors.Is(err, unix.EINVAL) {
		return nil, fmt.Errorf("tcx programs of %q: %w", l.Attrs().Name, err)
	}
	if err == nil {
		for _, p := range q.Programs {
			hooks = append(hooks, hook{kind: "tcx", name: programName(p.ID)})
		}
	}
	filters, err := netdump.Whole(func() ([]netlink.Filter, error) {
		return netlink.FilterList(l, netlink.HANDLE_MIN_INGRESS)
	})
	if err != nil && !errors.Is(err, unix.EINVAL) { // no clsact there
		return nil, fmt.Errorf("tc filters of %q: %w", l.Attrs().Name, err)
	}
	slices.SortStableFunc(filters, func(a, b netlink.Filter) int {
		return cmp.Compare(a.Attrs().Priority, b.Attrs().Priority)
	})
	for _, f := range filters {
		h := hook{kind: "tc", name: f.Type()}
		if b, ok := f.(*netlink.BpfFilter); ok {
			if h.name = programName(ebpf.ProgramID(b.Id)); h.name == "" {
				h.name = b.Name
			}
		}
		hooks = append(hooks, h)
	}
	return hooks, nil
}

// programName returns "" for a program that is gone or that the caller may not see.
func programName(id ebpf.ProgramID) string {
	p, err := ebpf.NewProgramFromID(id)
	if err != nil {
		return ""
	}
	defer p.Close()
	info, err := p.Info()
	if err != nil {
		return ""
	}
	return info.Name
}

func claims() ([]claim, error) {
	links, err := netdump.Whole(netlink.LinkList)
	if err != nil {
		return nil, err
	}
	name := map[int]string{}
	for _, l := range links {
		name[l.Attrs().Index] = l.Attrs().Name
	}
	var all []claim
	addrs, err := netdump.Whole(func() ([]netlink.Addr, error) {
		return netlink.AddrList(nil, netlink.FAMILY_V4)
	})
	if err != nil {
		return nil, err
	}
	for _, a := range addrs {
		all = append(all, claim{iface: name[a.LinkIndex], what: prefix(a.IPNet)})
	}
	routes, err := netdump.Whole(func() ([]netlink.Route, error) {
		return netlink.RouteList(nil, netlink.FAMILY_V4)
	})
	if err != nil {
		return nil, err
	}
	for _, r := range routes {
		if r.Dst != nil {
			all = append(all, claim{iface: name[r.LinkIndex], what: prefix(r.Dst),
				route: true})
		}
	}
	return all, nil
}

func prefix(n *net.IPNet) netip.Prefix {
	addr, _ := netip.AddrFromSlice(n.IP)
	bits, _ := n.Mask.Size()
	return netip.PrefixFrom(addr.Unmap(), bits)
}

// rules runs each tool that is installed. nft also shows the rules of iptables-nft;
// iptables-legacy has tables of its own.
func rules(ctx context.Context, addr netip.Addr) ([]rule, error) {
	var found []rule
	var errs []error
	asked := 0
	for _, tool := range [][]string{{"nft", "list", "ruleset"}, {"iptables-legacy-save"}} {
		out, err := output(ctx, tool...)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		asked++
		found = append(found, parseRules(out, addr)...)
	}
	if asked == 0 {
		out, err := output(ctx, "iptables-save")
		if err != nil {
			return nil, errors.Join(append(errs, err)...)
		}
		found = parseRules(out, addr)
	}
	return found, nil
}

func output(ctx context.Context, argv ...string) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, askFor)
	defer cancel()
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		line, _, _ := strings.Cut(stderr.String(), "\n")
		return nil, fmt.Errorf("%s: %w %s", argv[0], err, line)
	}
	return out, nil
}

// parseRules reads the output of nft list ruleset and of iptables-save.
func parseRules(out []byte, addr netip.Addr) []rule {
	var found []rule
	var table, chain string
	for line := range strings.Lines(string(out)) {
		line = strings.TrimSpace(line)
		words := strings.Fields(line)
		if len(words) == 0 {
			continue
		}
		switch {
		case words[0] == "table" && len(words) >= 3: // nft: table ip nat {
			table = words[1] + " " + words[2]
			continue
		case words[0] == "chain" && len(words) >= 2: // nft: chain PREROUTING {
			chain = words[1]
			continue
		case words[0][0] == '*': // iptables: *nat
			table = "ip " + words[0][1:]
			continue
		case words[0] == "-A" && len(words) >= 2: // iptables: -A PREROUTING …
			chain = words[1]
		}
		if slices.ContainsFunc(words, func(w string) bool { return names(w, addr) }) {
			found = append(found, rule{chain: table + " " + chain, text: line})
		}
	}
	return found
}

// names reports whether word is addr, or a network of at most a /16 around it. A larger network is
// not about the endpoint.
func names(word string, addr netip.Addr) bool {
	word = strings.Trim(word, "{},!")
	if a, err := netip.ParseAddr(word); err == nil {
		return a == addr
	}
	p, err := netip.ParsePrefix(word)
	return err == nil && p.Bits() >= 16 && p.Contains(addr)
}

func get(ctx context.Context, u string) (int, []byte, error) {
	ctx, cancel := context.WithTimeout(ctx, askFor)
	defer cancel()
	transport := &http.Transport{DisableKeepAlives: true}
	if rest, ok := strings.CutPrefix(u, "unix://"); ok {
		socket, path, _ := strings.Cut(rest, ":")
		u = "http://localhost" + path
		transport.DialContext = func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", socket)
		}
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, u, nil)
	if err != nil {
		return 0, nil, err
	}
	res, err := transport.RoundTrip(req)
	if err != nil {
		var ue *url.Error
		if errors.As(err, &ue) {
			err = ue.Err
		}
		return 0, nil, err
	}
	defer res.Body.Close()
	body, err := io.ReadAll(io.LimitReader(res.Body, 64<<10))
	return res.StatusCode, body, err
}
