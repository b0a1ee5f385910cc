//go:build root

package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/elastic/go-seccomp-bpf"
	"github.com/elastic/go-seccomp-bpf/arch"
	"golang.org/x/sys/unix"

	"metad/internal/testdocker"
)

const unitFile = "../../packaging/metad.service"

// unit returns the settings of the unit, the words of each.
func unit(t *testing.T) map[string][]string {
	t.Helper()
	f, err := os.Open(unitFile)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	settings := map[string][]string{}
	for lines := bufio.NewScanner(f); lines.Scan(); {
		if key, value, ok := strings.Cut(lines.Text(), "="); ok &&
			!strings.HasPrefix(key, "#") {
			settings[key] = append(settings[key], strings.Fields(value)...)
		}
	}
	return settings
}

// systemdAnalyze runs it without a systemd.
func systemdAnalyze(t *testing.T, args ...string) string {
	t.Helper()
	if _, err := exec.LookPath("systemd-analyze"); err != nil {
		t.Skip("no systemd-analyze: install the package systemd")
	}
	out, err := exec.Command("systemd-analyze", args...).Output()
	if err != nil {
		t.Fatalf("systemd-analyze %q: %v", args, err)
	}
	return string(out)
}

// The unit gives metad little beyond what it needs: systemd's own measure of exposure, from 0
// (none) to 10, is 4 at most.
func TestRootUnitExposure(t *testing.T) {
	out := systemdAnalyze(t, "security", "--offline=true", "--no-pager", unitFile)
	m := regexp.MustCompile(
		`Overall exposure level for metad.service: ([0-9.]+)`).FindStringSubmatch(out)
	if m == nil {
		t.Fatalf("no level in:\n%s", out)
	}
	if level, err := strconv.ParseFloat(m[1], 64); err != nil || level > 4 {
		t.Errorf("got level %s, %v, want at most 4.0:\n%s", m[1], err, out)
	}
	t.Logf("level %s", m[1])
}

// filters are the unit's that a process puts on itself.
type filters struct {
	Syscalls []string
	Families []uint64
}

var families = map[string]uint64{"AF_UNIX": unix.AF_UNIX, "AF_INET": unix.AF_INET,
	"AF_INET6": unix.AF_INET6, "AF_NETLINK": unix.AF_NETLINK}

// asFiltered in the environment has the filters of a process that is metad.
const asFiltered = "METAD_TEST_FILTERS"

// apply puts the filters on this process, all its threads, for good.
func (f filters) apply() error {
	info, err := arch.GetInfo("")
	if err != nil {
		return err
	}
	// With conditions, as RestrictAddressFamilies and RestrictNamespaces=net have it.
	conditional := []seccomp.NameWithConditions{
		{Name: "unshare", Conditions: []seccomp.Condition{{Operation: seccomp.Equal, Value: unix.CLONE_NEWNET}}},
		{Name: "setns", Conditions: []seccomp.Condition{{Argument: 1, Operation: seccomp.Equal, Value: unix.CLONE_NEWNET}}},
	}
	for _, family := range f.Families {
		conditional = append(conditional, seccomp.NameWithConditions{Name: "socket",
			Conditions: []seccomp.Condition{{Operation: seccomp.Equal, Value: family}}})
	}
	var names []string
	for _, name := range f.Syscalls {
		if _, known := info.SyscallNames[name]; known && name != "unshare" &&
			name != "setns" && name != "socket" {
			names = append(names, name)
		}
	}
	err = seccomp.LoadFilter(seccomp.Filter{NoNewPrivs: true, Flag: seccomp.FilterFlagTSync,
		Policy: seccomp.Policy{
			DefaultAction: seccomp.ActionErrno,
			Syscalls: []seccomp.SyscallGroup{
				{Action: seccomp.ActionAllow, Names: names},
				{Action: seccomp.ActionAllow, NamesWithCondtions: conditional},
			},
		}})
	// MemoryDenyWriteExecute; Linux 6.3.
	const setMDWE, refuseExecGain = 65, 1
	if merr := unix.Prctl(setMDWE, refuseExecGain, 0, 0, 0); merr != nil &&
		!errors.Is(merr, unix.EINVAL) {
		err = errors.Join(err, merr)
	}
	return err
}

// filterMe applies the filters that the environment has.
func filterMe() {
	text := os.Getenv(asFiltered)
	if text == "" {
		return
	}
	var f filters
	err := json.Unmarshal([]byte(text), &f)
	if err == nil {
		err = f.apply()
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "filters:", err)
		os.Exit(4)
	}
}

// expand returns the system calls that the words of SystemCallFilter name.
func expand(t *testing.T, words []string) (calls []string) {
	t.Helper()
	for _, w := range words {
		if !strings.HasPrefix(w, "@") {
			calls = append(calls, w)
			continue
		}
		for _, line := range strings.Split(systemdAnalyze(t, "syscall-filter", w),
			"\n")[1:] {
			if line = strings.TrimSpace(line); line != "" &&
				!strings.HasPrefix(line, "#") {
				calls = append(calls, expand(t, []string{line})...)
			}
		}
	}
	slices.Sort(calls)
	return slices.Compact(calls)
}

// sandbox is the unit's file systems and capabilities, and the shell that makes them.
const sandbox = `set -e
mount --make-rslave /
for d in /usr /boot /etc /sys/fs/cgroup; do
	[ -d $d ] || continue
	mount --rbind $d $d
	mount -o remount,ro,bind $d
done
mount -t tmpfs -o mode=0000,ro none /home
caps=$1
shift
exec setpriv --no-new-privs --bounding-set "$caps" --inh-caps -all -- "$@"`

// metad does all that it does with the capabilities of the unit and behind its filters: it starts,
// answers tasks with documents and statistics, writes a metadata file, is taken over from, is
// restarted, and stops.
func TestRootUnitIsEnough(t *testing.T) {
	settings := unit(t)
	caps := "-all"
	for _, c := range settings["CapabilityBoundingSet"] {
		caps += ",+" + strings.ToLower(strings.TrimPrefix(c, "CAP_"))
	}
	f := filters{Syscalls: expand(t, settings["SystemCallFilter"])}
	for _, name := range settings["RestrictAddressFamilies"] {
		family, ok := families[name]
		if !ok {
			t.Fatalf("RestrictAddressFamilies: %s is new here", name)
		}
		f.Families = append(f.Families, family)
	}
	if len(f.Syscalls) < 100 || len(settings["CapabilityBoundingSet"]) == 0 {
		t.Fatalf("got %d system calls, capabilities %s", len(f.Syscalls), caps)
	}
	text, err := json.Marshal(f)
	if err != nil {
		t.Fatal(err)
	}

	h := testdocker.Shared(t)
	task := h.RunTask(t,
		testdocker.Task{ID: "unit", Containers: []testdocker.Container{{Name: "app"}}})
	socket := filepath.Join(t.TempDir(), "docker.sock")
	s := newSupervisor(t, h)
	d := s.d
	d.env = append(d.env, asFiltered+"="+string(text))
	s.wrap = []string{"unshare", "-m", "sh", "-c", sandbox, "sh", caps}
	args := []string{"--docker-proxy", socket, "--container-metadata"}
	s.start(args...)
	status := readFile(fmt.Sprintf("/proc/%d/status", d.cmd.Process.Pid))
	for _, want := range []string{"NoNewPrivs:\t1", "Seccomp:\t2"} {
		if !strings.Contains(status, want) {
			t.Errorf("the filters are not there: no %q in\n%s", want, status)
		}
	}
	// The second has taken over from the first, the third has got what the second left.
	for i := range 3 {
		if got := taskOf(t, ask(t, h, task.Containers[0],
			"/v2/metadata")); got.TaskARN != task.ARN {
			t.Errorf("got %+v, want %s", got, task.ARN)
		}
		waitFor(t, "a sample", func() bool {
			return strings.Contains(ask(t, h, task.Containers[0], "/v2/stats"),
				`"cpu_stats":{"cpu_usage":{"total_usage":`)
		})
		docker := dockerAt(t, h, socket)
		id := docker("run", "-d", "--network", h.ECSNetwork(t), testdocker.BusyboxImage)
		t.Cleanup(func() { h.Remove(t, id) })
		waitFor(t, "the file to be READY", func() bool {
			return strings.Contains(h.Exec(t, id, "sh", "-c",
				"cat $ECS_CONTAINER_METADATA_FILE"),
				`"MetadataFileStatus": "READY"`)
		})
		if out, code := d.run("tasks", "--run-dir", d.runDir()); code != 0 {
			t.Errorf("metad tasks: got %d %s", code, out)
		}
		switch old := d.done; i {
		case 0:
			s.start(args...)
			<-old
		case 1:
			s.stop(true)
			s.start(args...)
		}
	}
	if code := d.stop(); code != 0 {
		t.Errorf("got exit code %d, want 0", code)
	}
	for _, word := range []string{"operation not permitted", "permission denied",
		"read-only file system"} {
		for _, line := range strings.Split(d.out.String(), "\n") {
			if strings.Contains(line, word) {
				t.Errorf("the unit is in the way: %s", line)
			}
		}
	}
}
