//go:build root && image

package main

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/docker/docker/api/types/container"
	"github.com/docker/docker/api/types/network"
	"golang.org/x/sys/unix"

	"metad/internal/testdocker"
)

// imageFile is the image for docker load; make test-image builds it.
const imageFile = "METAD_TEST_IMAGE"

// hostPaths are the test host's own places for what compose.yaml mounts of a host.
func hostPaths(t *testing.T, h *testdocker.Host) map[string]string {
	t.Helper()
	pins, err := os.MkdirTemp("/sys/fs/bpf", "metad-test-")
	if err != nil {
		t.Fatalf("is bpffs mounted? %v", err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(pins); err != nil {
			t.Error(err)
		}
	})
	etc := t.TempDir()
	bundles, err := filepath.Rel(h.Dir, h.BundleDir())
	if err != nil {
		t.Fatal(err)
	}
	// The test host's containerd is not where a machine's is.
	if err := os.WriteFile(filepath.Join(etc, "metad.yaml"),
		[]byte("bundle-dirs: [/run/"+bundles+"]\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	return map[string]string{"/run": h.Dir, "/sys/fs/bpf": pins,
		"/sys/fs/cgroup": "/sys/fs/cgroup", "/var/lib/ecs/data": t.TempDir(),
		"/etc/metad": etc}
}

// createMetad creates metad's container as compose.yaml describes it.
func createMetad(t *testing.T, h *testdocker.Host, paths map[string]string,
	cmd ...string) (id string) {
	t.Helper()
	s := readCompose(t)
	host := &container.HostConfig{
		NetworkMode: container.NetworkMode(s.NetworkMode), PidMode: container.PidMode(s.PID),
		CgroupnsMode: container.CgroupnsMode(s.Cgroup), ReadonlyRootfs: s.ReadOnly,
		CapAdd: capabilities(t, s.CapAdd), CapDrop: s.CapDrop,
		RestartPolicy: container.RestartPolicy{
			Name: container.RestartPolicyMode(s.Restart)},
	}
	for _, opt := range s.SecurityOpt {
		if opt == "systempaths=unconfined" { // the clients' word for two empty lists
			host.MaskedPaths, host.ReadonlyPaths = []string{}, []string{}
			continue
		}
		host.SecurityOpt = append(host.SecurityOpt, opt)
	}
	for _, v := range s.Volumes {
		source, rest, _ := strings.Cut(v, ":")
		if paths[source] == "" {
			t.Fatalf("compose.yaml: the mount of %s is new here", source)
		}
		bind := paths[source] + ":" + rest
		private := strings.TrimSuffix(bind, ":rslave")
		if private != bind && !shared(t, h.Dir) {
			t.Log("the machine's mounts are private: without rslave")
			bind = private
		}
		host.Binds = append(host.Binds, bind)
	}
	created, err := h.Client.ContainerCreate(context.Background(), &container.Config{
		Image: "metad-under-test", Cmd: cmd}, host, &network.NetworkingConfig{}, nil, "")
	if err != nil {
		t.Fatalf("create metad's container: %v", err)
	}
	t.Cleanup(func() { h.Remove(t, created.ID) })
	return created.ID
}

// capabilities returns those of names that this machine can give. SYS_RESOURCE, which metad needs
// before Linux 5.11 only, is missing where the machine is a container itself.
func capabilities(t *testing.T, names []string) []string {
	t.Helper()
	held, err := unix.PrctlRetInt(unix.PR_CAPBSET_READ, unix.CAP_SYS_RESOURCE, 0, 0, 0)
	if err != nil {
		t.Fatalf("read the bounding set: %v", err)
	}
	return slices.DeleteFunc(names, func(name string) bool {
		return held == 0 && name == "SYS_RESOURCE"
	})
}

// shared reports whether mounts below dir can propagate into a container.
func shared(t *testing.T, dir string) bool {
	t.Helper()
	out, err := exec.Command("findmnt", "-no", "PROPAGATION", "-T", dir).Output()
	if err != nil {
		t.Fatalf("findmnt: %v", err)
	}
	return strings.Contains(string(out), "shared")
}

// The image serves other containers with the capabilities and mounts of compose.yaml and no more.
// It does so again after a restart of the Docker Engine, with live-restore and without. Its
// command detach removes what it leaves.
func TestRootImage(t *testing.T) {
	t.Run("live-restore", func(t *testing.T) { testImage(t, testdocker.Start(t)) })
	t.Run("no live-restore", func(t *testing.T) { testImage(t, testdocker.StartMortal(t)) })
}

func testImage(t *testing.T, h *testdocker.Host) {
	file := os.Getenv(imageFile)
	if file == "" {
		t.Fatalf("%s names no image: make test-image builds one", imageFile)
	}
	_, ref, ok := strings.Cut(strings.TrimSpace(h.CLI(t, "load", "-i", file)),
		"Loaded image: ")
	if !ok {
		t.Fatal("docker load names no image")
	}
	h.CLI(t, "tag", ref, "metad-under-test")
	paths := hostPaths(t, h)
	metad := createMetad(t, h, paths)
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("metad said:\n%s", h.CLI(t, "logs", metad))
		}
	})
	always := func(_ *container.Config, hc *container.HostConfig) {
		hc.RestartPolicy.Name = container.RestartPolicyAlways
	}
	before := h.Run(t, testdocker.Container{Configure: always})
	h.StartContainer(t, metad)
	served := func(id string) {
		t.Helper()
		waitFor(t, "an answer to "+id[:12], func() bool {
			out, _, err := h.TryExec(id, "wget", "-qO-",
				"http://169.254.170.2/v4/task")
			return err == nil && strings.Contains(out, `"DockerId":"`+id+`"`)
		})
		waitFor(t, "a sample of "+id[:12], func() bool {
			out, _, err := h.TryExec(id, "wget", "-qO-",
				"http://169.254.170.2/v4/stats")
			return err == nil && strings.Contains(out, `"total_usage":`)
		})
	}
	served(before)
	served(h.Run(t, testdocker.Container{}))

	h.StopDocker(t)
	h.StartDocker(t)
	served(before)
	served(h.Run(t, testdocker.Container{}))

	h.CLI(t, "stop", metad)
	if got := h.Inspect(t, metad).State.ExitCode; got != 0 {
		t.Errorf("docker stop: got exit code %d, want 0", got)
	}
	detach := createMetad(t, h, paths, "detach")
	h.StartContainer(t, detach)
	if out := h.Output(t, detach); h.Inspect(t, detach).State.ExitCode != 0 {
		t.Errorf("metad detach: %s", out)
	}
	left, err := os.ReadDir(filepath.Join(paths["/sys/fs/bpf"], "metad"))
	if err == nil && len(left) > 0 {
		t.Errorf("metad detach left pins: %v", left)
	}
}
