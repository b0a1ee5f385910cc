package doctor

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"path"
	"slices"
	"strconv"
	"strings"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"metad/pkg/loader"
)

var endpoint = loader.Endpoint.Addr()

// hostEnd is the host's end of the veth into metad's namespace. It exists while metad runs.
const hostEnd = "metad0"

func one(name string, s Status, found, do string) []Check {
	return []Check{{Name: name, Status: s, Found: found, Do: do}}
}

// checkKernel loads a tc program with bpf_redirect_peer, the newest feature that metad needs.
func checkKernel(_ context.Context, cfg Config, h *host) []Check {
	release, major, minor, err := kernel(h)
	if err != nil {
		return one("kernel", Fail, err.Error(), "mount /proc")
	}
	tcx := major > 6 || major == 6 && minor >= 6
	way := "clsact"
	if tcx && cfg.Attach != "clsact" {
		way = "tcx"
	}
	checks := one("kernel", OK, release+", attaches by "+way, "")
	if cfg.Attach == "tcx" && !tcx {
		checks = one("kernel", Fail, release+" has no tcx",
			"leave --attach at auto, or run Linux 6.6 or later")
	}
	switch err := h.program(); {
	case errors.Is(err, ebpf.ErrNotSupported):
		checks = append(checks, Check{"bpf", Fail, "no bpf_redirect_peer in " + release,
			"run Linux 5.10 or later"})
	case errors.Is(err, unix.EPERM):
		checks = append(checks,
			Check{"bpf", Fail, "may not load a tc program: " + err.Error(),
				"run as root; in a container: --privileged, or the capabilities " +
					"below and no seccomp profile that forbids bpf(2)"})
	case err != nil:
		checks = append(checks, Check{"bpf", Fail, "load a tc program: " + err.Error(),
			"check that the kernel has CONFIG_BPF_SYSCALL and CONFIG_NET_CLS_BPF"})
	default:
		checks = append(checks,
			Check{"bpf", OK, "tc programs load, bpf_redirect_peer exists", ""})
	}
	if jit, err := h.readFile("/proc/sys/net/core/bpf_jit_enable"); err == nil &&
		strings.TrimSpace(string(jit)) == "0" {
		checks = append(checks,
			Check{"bpf jit", Warn,
				"off: every packet of every container is interpreted",
				"sysctl -w net.core.bpf_jit_enable=1"})
	}
	return checks
}

func kernel(h *host) (release string, major, minor int, err error) {
	b, err := h.readFile("/proc/sys/kernel/osrelease")
	if err != nil {
		return "", 0, 0, err
	}
	release = strings.TrimSpace(string(b))
	if _, err := fmt.Sscanf(release, "%d.%d", &major, &minor); err != nil {
		return "", 0, 0, fmt.Errorf("kernel release %q: %w", release, err)
	}
	return release, major, minor, nil
}

// checkCapabilities looks for what the loader needs, for SYS_PTRACE, which opens
// /proc/<pid>/ns/net of a container, and before Linux 5.11 for SYS_RESOURCE, which lifts
// RLIMIT_MEMLOCK.
func checkCapabilities(_ context.Context, _ Config, h *host) []Check {
	const name = "capabilities"
	status, err := h.readFile("/proc/thread-self/status")
	if err != nil {
		return one(name, Fail, err.Error(), "mount /proc")
	}
	_, rest, _ := strings.Cut(string(status), "\nCapEff:\t")
	line, _, _ := strings.Cut(rest, "\n")
	have, err := strconv.ParseUint(line, 16, 64)
	if err != nil {
		return one(name, Fail, fmt.Sprintf("CapEff of /proc/thread-self/status: %v", err),
			"mount /proc")
	}
	need := append(slices.Clone(loader.RequiredCaps), loader.Cap{Name: "CAP_SYS_PTRACE",
		Bit: unix.CAP_SYS_PTRACE})
	if _, major, minor, err := kernel(h); err == nil &&
		(major < 5 || major == 5 && minor < 11) {
		need = append(need, loader.Cap{Name: "CAP_SYS_RESOURCE",
			Bit: unix.CAP_SYS_RESOURCE})
	}
	var missing []string
	for _, n := range need {
		if have&(1<<n.Bit) == 0 {
			missing = append(missing, n.Name)
		}
	}
	if missing != nil {
		return one(name, Fail, "missing "+strings.Join(missing, ", "),
			"run as root, in the host's user and network namespaces")
	}
	return one(name, OK, "all that are needed", "")
}

func checkBTF(_ context.Context, _ Config, h *host) []Check {
	const vmlinux = "/sys/kernel/btf/vmlinux"
	if _, err := h.readFile(vmlinux); err != nil {
		return one("btf", Warn, "no "+vmlinux,
			"metad works without it; bpftool and tracers show less. A kernel with "+
				"CONFIG_DEBUG_INFO_BTF has it")
	}
	return one("btf", OK, vmlinux, "")
}

func checkBPFFS(_ context.Context, cfg Config, h *host) []Check {
	const name = "bpffs"
	// If the pin directory does not exist yet, look where it would be made.
	for dir := cfg.PinDir; ; dir = path.Dir(dir) {
		switch t, err := h.fsType(dir); {
		case errors.Is(err, fs.ErrNotExist) && dir != path.Dir(dir):
			continue
		case err != nil:
			return one(name, Fail, err.Error(), "mount -t bpf bpf /sys/fs/bpf")
		case t != unix.BPF_FS_MAGIC:
			return one(name, Fail,
				cfg.PinDir+" is not in a BPF file system: tasks would not be "+
					"known after a restart", "mount -t bpf bpf /sys/fs/bpf")
		}
		return one(name, OK, cfg.PinDir, "")
	}
}

func checkCgroup(_ context.Context, _ Config, h *host) []Check {
	const name, root = "cgroup", "/sys/fs/cgroup"
	t, err := h.fsType(root)
	if err != nil {
		return one(name, Warn, err.Error(),
			"mount /sys/fs/cgroup, or statistics come from Docker's stream, which "+
				"costs more")
	}
	var version string
	var missing []string
	if t == unix.CGROUP2_SUPER_MAGIC {
		version = "v2"
		b, err := h.readFile(root + "/cgroup.controllers")
		if err != nil {
			return one(name, Warn, err.Error(),
				"statistics need the controllers cpu, memory and io")
		}
		have := " " + strings.TrimSpace(string(b)) + " "
		for _, c := range []string{"cpu", "memory", "io"} {
			if !strings.Contains(have, " "+c+" ") {
				missing = append(missing, c)
			}
		}
	} else {
		version = "v1"
		for _, c := range []string{"cpuacct", "memory", "blkio"} {
			if _, err := h.fsType(root + "/" + c); err != nil {
				missing = append(missing, c)
			}
		}
	}
	if missing != nil {
		return one(name, Warn, version+", without "+strings.Join(missing, ", "),
			"statistics will lack these; for memory, boot with cgroup_enable=memory")
	}
	return one(name, OK, version, "")
}

func checkRunning(ctx context.Context, cfg Config, h *host) []Check {
	const name = "metad"
	links, err := h.links()
	if err != nil {
		return one(name, Fail, "list interfaces: "+err.Error(), "")
	}
	running := find(links, hostEnd) != nil
	status, body, err := h.get(ctx, "unix://"+cfg.AdminSocket+":/readyz")
	switch {
	case err != nil && !running:
		return one(name, OK, "not running", "")
	case err != nil:
		return one(name, Warn, hostEnd+" exists, but "+cfg.AdminSocket+" does not answer: "+
			err.Error(),
			"after a kill it is gone within seconds; otherwise metad hangs, or was "+
				"started with another --run-dir")
	case status != 200:
		return one(name, Fail, "runs but is not ready: "+strings.TrimSpace(string(body)),
			"see metad's log")
	case !running:
		return one(name, Fail, cfg.AdminSocket+" answers, but there is no "+hostEnd+
			" in this network namespace",
			"run metad and this command in the host's network namespace; free the "+
				"address if another program has it")
	}
	return one(name, OK, "runs and is ready", "")
}

// list joins the first few names.
func list(all []string) string {
	const most = 4
	if len(all) > most {
		return fmt.Sprintf("%s and %d more", strings.Join(all[:most], ", "), len(all)-most)
	}
	return strings.Join(all, ", ")
}

// checkAddress looks for another owner of the endpoint's address.
func checkAddress(_ context.Context, _ Config, h *host) []Check {
	const name = "address"
	claims, err := h.claims()
	if err != nil {
		return one(name, Warn, "addresses and routes: "+err.Error(), "")
	}
	var checks []Check
	for _, c := range claims {
		switch {
		case c.iface == hostEnd:
		case !c.route && c.what.Addr() == endpoint:
			checks = append(checks,
				Check{name, Warn, fmt.Sprintf("%s has %s", c.iface, endpoint),
					"containers of watched bridges do not reach it while " +
						"metad runs; remove it"})
		case c.route && c.what.Contains(endpoint) && c.what.Bits() >= 24:
			checks = append(checks,
				Check{name, Warn,
					fmt.Sprintf(
						"%s is a network of %s: another endpoint may be "+
							"there", c.what, c.iface),
					"containers of watched bridges get metad's answer; " +
						"remove the network, or leave its bridge out of " +
						"--bridges"})
		}
	}
	if checks == nil {
		return one(name, OK, endpoint.String()+" is free", "")
	}
	return checks
}

// checkRules reports the firewall's rules about the endpoint. metad's packets cross none of them.
// The rules apply to packets that metad does not take, and to all packets while it does not run.
func checkRules(ctx context.Context, _ Config, h *host) []Check {
	const name = "rules"
	rules, err := h.rules(ctx, endpoint)
	if err != nil {
		return one(name, Warn, err.Error(),
			"rules are not checked: install nft or iptables")
	}
	var checks []Check
	for _, r := range rules {
		found := r.chain + ": " + r.text
		lower := strings.ToLower(r.text)
		switch {
		case strings.Contains(lower, "drop") || strings.Contains(lower, "reject"):
			checks = append(checks,
				Check{name, Warn, found,
					"without metad the endpoint is unreachable, and host " +
						"processes may never reach it; remove the rule"})
		case strings.Contains(r.chain, "OUTPUT") ||
			strings.Contains(strings.ToLower(r.chain), "output"):
			checks = append(checks,
				Check{name, OK, found + " (host processes go there, not to metad)",
					""})
		default:
			checks = append(checks,
				Check{name, OK, found + " (while metad does not run)", ""})
		}
	}
	if checks == nil {
		return one(name, OK, "none for "+endpoint.String(), "")
	}
	return checks
}

// dockerURL returns the URL of the Engine's API without a path.
func dockerURL(dockerHost string) string {
	switch scheme, rest, _ := strings.Cut(dockerHost, "://"); scheme {
	case "unix":
		return dockerHost + ":"
	case "tcp":
		return "http://" + rest
	}
	return dockerHost
}

func checkDocker(ctx context.Context, cfg Config, h *host) []Check {
	const name = "docker"
	status, body, err := h.get(ctx, dockerURL(cfg.DockerHost)+"/version")
	do := "start it, or say where it is by --docker-host"
	if errors.Is(err, unix.EACCES) {
		do = "run as root"
	}
	if err != nil {
		return one(name, Fail, cfg.DockerHost+": "+err.Error(), do)
	}
	var v struct{ Version, APIVersion string }
	if err := json.Unmarshal(body, &v); status != 200 || err != nil || v.Version == "" {
		return one(name, Fail, fmt.Sprintf("%s: no Docker Engine (HTTP %d)", cfg.DockerHost,
			status), do)
	}
	return one(name, OK, fmt.Sprintf("%s, API %s at %s", v.Version, v.APIVersion,
		cfg.DockerHost), "")
}

// checkAgent warns of an agent that answers only in part. No agent at all is fine.
func checkAgent(ctx context.Context, cfg Config, h *host) []Check {
	const name = "agent"
	if cfg.AgentURL == "" {
		return one(name, OK, "switched off: what metad does not serve is answered 404", "")
	}
	_, _, err := h.get(ctx, cfg.AgentURL+"/")
	var cluster string
	if cfg.IntrospectionURL != "" {
		var meta struct{ Cluster, Version string }
		status, body, ierr := h.get(ctx, cfg.IntrospectionURL+"/v1/metadata")
		if ierr == nil && status == 200 && json.Unmarshal(body, &meta) == nil {
			cluster = meta.Cluster
		}
	}
	switch {
	case err != nil && cluster != "":
		return one(name, Fail, fmt.Sprintf("cluster %q, but %s does not answer: %v",
			cluster, cfg.AgentURL, err),
			"tasks get no credentials: see the agent's log, or set --agent-url")
	case err != nil:
		return one(name, OK,
			"none at "+cfg.AgentURL+": what metad does not serve is answered 404", "")
	case cluster == "" && cfg.IntrospectionURL != "":
		return one(name, Warn, cfg.AgentURL+" answers, "+cfg.IntrospectionURL+" does not",
			"cluster and container instance are taken from labels and flags; set "+
				"--agent-introspection-url")
	}
	return one(name, OK, strings.TrimSuffix(fmt.Sprintf("at %s, cluster %q", cfg.AgentURL,
		cluster), `, cluster ""`), "")
}
