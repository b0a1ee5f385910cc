//go:build root

package main

import (
	"bufio"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/docker/docker/api/types/container"

	"metad/internal/expect"
	"metad/internal/testdocker"
)

// pingAt asks the Engine by the socket, which may be one that is mounted in a process's namespace.
func pingAt(socket string) error {
	c, err := net.DialTimeout("unix", socket, 5*time.Second)
	if err != nil {
		return err
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
		return err
	}
	fmt.Fprint(c, "GET /_ping HTTP/1.1\r\nHost: docker\r\nConnection: close\r\n\r\n")
	resp, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return errors.New(resp.Status)
	}
	return nil
}

// A container that has the proxy's socket mounted as a file reaches the Engine by it after each
// takeover. A successor without a proxy, or with one elsewhere, ends the socket.
func TestRootProxySocketMounted(t *testing.T) {
	h := testdocker.Shared(t)
	socket := filepath.Join(t.TempDir(), "docker.sock")
	d := startMetad(t, h, "--docker-proxy", socket)
	waitFor(t, "the proxy", func() bool { return pingAt(socket) == nil })
	id := h.Run(t, testdocker.Container{Network: "none", Configure: func(_ *container.Config,
		hc *container.HostConfig) {
		hc.Binds = []string{socket + ":/proxy.sock"}
	}})
	mounted := fmt.Sprintf("/proc/%d/root/proxy.sock", h.Inspect(t, id).State.Pid)
	takeOver := func(args ...string) {
		t.Helper()
		old := d.done
		d.start(args...)
		<-old
		d.waitReady()
	}
	for n := range 4 {
		if err := errors.Join(pingAt(mounted), pingAt(socket)); err != nil {
			t.Fatalf("after %d takeovers: %v", n, err)
		}
		takeOver("--docker-proxy", socket)
	}
	other := filepath.Join(filepath.Dir(socket), "other.sock")
	takeOver("--docker-proxy", other)
	expect.Until(t, "the proxy elsewhere", func() bool { return pingAt(other) == nil })
	if _, err := os.Lstat(socket); !errors.Is(err, fs.ErrNotExist) || pingAt(mounted) == nil {
		t.Errorf("the socket that no proxy serves: got %v, want it to be gone", err)
	}
	takeOver("--docker-proxy", "")
	if _, err := os.Lstat(other); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the socket of before: got %v, want it to be gone", err)
	}
}
