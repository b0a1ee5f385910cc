package testdocker

import (
	"archive/tar"
	"bytes"
	"context"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/docker/docker/api/types/container"
	"github.com/docker/docker/api/types/image"
	"github.com/docker/docker/pkg/stdcopy"
)

// BusyboxImage is on every host: a static busybox with all its applets. Its default command
// sleeps for ever.
const BusyboxImage = "metad-test:latest"

// Container says what to create. The zero value is a sleeping busybox on docker0.
type Container struct {
	Name    string
	Image   string // "": BusyboxImage
	Cmd     []string
	Env     []string
	Labels  map[string]string
	Network string // "": docker0; else a network's name, "none", "host" or "container:<id>"

	// Configure, if not nil, changes what has been made of the rest.
	Configure func(*container.Config, *container.HostConfig)
}

// Create creates a container, which is removed when the test ends, and returns its id.
func (h *Host) Create(t testing.TB, c Container) (id string) {
	t.Helper()
	config := &container.Config{Image: c.Image, Cmd: c.Cmd, Env: c.Env, Labels: c.Labels,
		// else a process 1 without a handler makes docker stop wait 10 s
		StopSignal: "SIGKILL"}
	if config.Image == "" {
		config.Image = BusyboxImage
	}
	host := &container.HostConfig{NetworkMode: container.NetworkMode(c.Network)}
	if c.Configure != nil {
		c.Configure(config, host)
	}
	created, err := h.Client.ContainerCreate(context.Background(), config, host, nil, nil,
		c.Name)
	if err != nil {
		t.Fatalf("create container: %v", err)
	}
	t.Cleanup(func() { h.remove(created.ID) })
	return created.ID
}

// StartContainer starts a created or stopped container.
func (h *Host) StartContainer(t testing.TB, id string) {
	t.Helper()
	if err := h.Client.ContainerStart(context.Background(), id,
		container.StartOptions{}); err != nil {
		t.Fatalf("start container: %v", err)
	}
}

// Run creates and starts a container, which is removed when the test ends, and returns its id.
func (h *Host) Run(t testing.TB, c Container) (id string) {
	t.Helper()
	id = h.Create(t, c)
	h.StartContainer(t, id)
	return id
}

// Remove kills and removes a container.
func (h *Host) Remove(t testing.TB, id string) {
	t.Helper()
	if err := h.remove(id); err != nil {
		t.Fatalf("remove container: %v", err)
	}
}

func (h *Host) remove(id string) error {
	return h.Client.ContainerRemove(context.Background(), id,
		container.RemoveOptions{Force: true, RemoveVolumes: true})
}

// Inspect returns what the Engine says about a container.
func (h *Host) Inspect(t testing.TB, id string) container.InspectResponse {
	t.Helper()
	inspect, err := h.Client.ContainerInspect(context.Background(), id)
	if err != nil {
		t.Fatalf("inspect container: %v", err)
	}
	return inspect
}

// Exec runs a command in a running container and returns what it writes, standard error included.
// An exit code other than 0 fails the test.
func (h *Host) Exec(t testing.TB, id string, cmd ...string) string {
	t.Helper()
	out, code, err := h.TryExec(id, cmd...)
	if err != nil || code != 0 {
		t.Fatalf("exec %q: code %d, error %v: %s", cmd, code, err, out)
	}
	return out
}

// TryExec is Exec that leaves judging the exit code to the caller. Safe for concurrent use.
func (h *Host) TryExec(id string, cmd ...string) (out string, code int, err error) {
	ctx := context.Background()
	created, err := h.Client.ContainerExecCreate(ctx, id, container.ExecOptions{Cmd: cmd,
		AttachStdout: true, AttachStderr: true})
	if err != nil {
		return "", 0, err
	}
	stream, err := h.Client.ContainerExecAttach(ctx, created.ID, container.ExecAttachOptions{})
	if err != nil {
		return "", 0, err
	}
	defer stream.Close()
	var b bytes.Buffer
	if _, err := stdcopy.StdCopy(&b, &b, stream.Reader); err != nil {
		return b.String(), 0, err
	}
	state, err := h.Client.ContainerExecInspect(ctx, created.ID)
	return b.String(), state.ExitCode, err
}

// Output waits until a container has ended and returns what it has written, standard error
// included.
func (h *Host) Output(t testing.TB, id string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	ended, errs := h.Client.ContainerWait(ctx, id, container.WaitConditionNotRunning)
	select {
	case <-ended:
	case err := <-errs:
		t.Fatalf("wait for container: %v", err)
	}
	log, err := h.Client.ContainerLogs(ctx, id, container.LogsOptions{ShowStdout: true,
		ShowStderr: true})
	if err != nil {
		t.Fatalf("output of container: %v", err)
	}
	defer log.Close()
	var b strings.Builder
	if _, err := stdcopy.StdCopy(&b, &b, log); err != nil {
		t.Fatalf("output of container: %v", err)
	}
	return b.String()
}

// ImageFromBinary makes the image ref whose entrypoint is the statically linked program at file.
// Busybox is in it too.
func (h *Host) ImageFromBinary(t testing.TB, ref, file string) {
	t.Helper()
	program, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if err := h.importImage(ref, map[string][]byte{"app": program},
		`ENTRYPOINT ["/app"]`); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_, _ = h.Client.ImageRemove(context.Background(), ref,
			image.RemoveOptions{Force: true})
	})
}

// ImageFromTree makes the image ref of the regular files below dir. Busybox is in it too.
func (h *Host) ImageFromTree(t testing.TB, ref, dir string) {
	t.Helper()
	files := map[string][]byte{}
	err := filepath.WalkDir(dir, func(file string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		name, err := filepath.Rel(dir, file)
		if err == nil {
			files[name], err = os.ReadFile(file)
		}
		return err
	})
	if err == nil {
		err = h.importImage(ref, files)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_, _ = h.Client.ImageRemove(context.Background(), ref,
			image.RemoveOptions{Force: true})
	})
}

func (h *Host) importBusybox() error {
	return h.importImage(BusyboxImage, nil, `CMD ["sleep", "2147483647"]`)
}

// importImage makes an image of one layer: busybox and the programs, by path without leading slash.
func (h *Host) importImage(ref string, programs map[string][]byte, changes ...string) error {
	layer, err := busyboxTar(programs)
	if err != nil {
		return fmt.Errorf("image %s: %w", ref, err)
	}
	out, err := h.Client.ImageImport(context.Background(), image.ImportSource{Source: layer,
		SourceName: "-"}, ref,
		image.ImportOptions{Changes: changes})
	if err != nil {
		return fmt.Errorf("image %s: %w", ref, err)
	}
	defer out.Close()
	_, err = io.Copy(io.Discard, out)
	return err
}

func busyboxTar(programs map[string][]byte) (io.Reader, error) {
	const busybox = "/bin/busybox"
	binary, err := os.ReadFile(busybox)
	if err != nil {
		return nil, err
	}
	applets, err := exec.Command(busybox, "--list-full").Output()
	if err != nil {
		return nil, fmt.Errorf("list busybox's applets: %w", err)
	}
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	made := map[string]bool{}
	add := func(hdr tar.Header, body []byte) {
		if err == nil && !made[hdr.Name] {
			made[hdr.Name] = true
			hdr.Size = int64(len(body))
			err = w.WriteHeader(&hdr)
		} else {
			return
		}
		if err == nil {
			_, err = w.Write(body)
		}
	}
	for _, dir := range []string{"bin/", "sbin/", "usr/", "usr/bin/", "usr/sbin/", "etc/",
		"root/", "dev/", "proc/", "sys/", "run/"} {
		add(tar.Header{Typeflag: tar.TypeDir, Name: dir, Mode: 0o755}, nil)
	}
	add(tar.Header{Typeflag: tar.TypeDir, Name: "tmp/", Mode: 0o1777}, nil)
	add(tar.Header{Typeflag: tar.TypeReg, Name: "etc/passwd", Mode: 0o644},
		[]byte("root:x:0:0::/root:/bin/sh\nnobody:x:65534:65534::/:/bin/sh\n"))
	add(tar.Header{Typeflag: tar.TypeReg, Name: "etc/group", Mode: 0o644},
		[]byte("root:x:0:\nnogroup:x:65534:\n"))
	add(tar.Header{Typeflag: tar.TypeReg, Name: "bin/busybox", Mode: 0o755}, binary)
	for _, applet := range strings.Fields(string(applets)) {
		if path.Dir(applet) == "." {
			continue // linuxrc
		}
		add(tar.Header{Typeflag: tar.TypeSymlink, Name: applet, Linkname: busybox,
			Mode: 0o777}, nil)
	}
	for name, body := range programs {
		add(tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o755}, body)
	}
	if err != nil {
		return nil, err
	}
	return &b, w.Close()
}
