//go:build root

package main

import (
	"fmt"
	"net"
	"net/http"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"metad/internal/testdocker"
)

// A user of the host has the agent's port: no container's request for credentials goes there. When
// it is root's, as the agent's is, it does.
func TestRootAgentPortOfAUser(t *testing.T) {
	h := testdocker.Shared(t)
	id := h.Run(t, testdocker.Container{})
	asked := make(chan string, 100)
	var squatter net.Listener
	if err := h.Do(func() (err error) {
		const nobody = 65534
		// of this thread, which ends
		if _, _, errno := unix.RawSyscall(unix.SYS_SETRESUID, nobody, nobody,
			nobody); errno != 0 {
			return errno
		}
		squatter, err = net.Listen("tcp4", "127.0.0.1:51679")
		return err
	}); err != nil {
		t.Fatal(err)
	}
	s := &http.Server{Handler: http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		asked <- r.URL.Path
	})}
	go s.Serve(squatter)
	defer s.Close()
	d := startMetad(t, h)
	const path = "/v2/credentials/c0ffee"
	if code := status(t, h, id, path); code != "404" || len(asked) > 0 {
		t.Errorf("with a user's listener: got %s, which was asked %d times, want 404 "+
			"and never", code, len(asked))
	}
	if n := strings.Count(d.out.String(), "the ECS agent's port belongs to a user"); n != 1 {
		t.Errorf("got %d lines about it, want 1:\n%s", n, d.out)
	}
	s.Close()
	startAgent(t, h, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, agentAnswer) }))
	waitFor(t, "the agent's answer", func() bool {
		out, _, err := h.TryExec(id, "wget", "-qO-", "http://169.254.170.2"+path)
		return err == nil && out == agentAnswer
	})
}
