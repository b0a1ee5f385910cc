//go:build root

package main

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"metad/internal/testdocker"
)

const composeFile = `version: "2.4"
services:
  web:
    image: %[1]s
    init: true
  db:
    image: %[1]s
    init: true
  cache:
    image: %[1]s
    init: true
`

// project is a Compose project of three services, brought up by real Compose.
type project struct {
	t         *testing.T
	host      *testdocker.Host
	name, dir string
	socket    string // of the Engine or of metad's proxy
}

func newProject(t *testing.T, h *testdocker.Host, name, socket string) *project {
	t.Helper()
	p := &project{t: t, host: h, name: name, dir: t.TempDir(), socket: socket}
	if err := os.WriteFile(filepath.Join(p.dir, "docker-compose.yml"),
		fmt.Appendf(nil, composeFile, testdocker.BusyboxImage), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.compose("down", "-t", "1") })
	p.compose("up", "-d")
	return p
}

func (p *project) compose(args ...string) {
	p.t.Helper()
	p.host.Compose(p.t, p.dir, p.socket, append([]string{"-p", p.name}, args...)...)
}

// containers returns the ids of the project's containers, or of one service's.
func (p *project) containers(service string) []string {
	p.t.Helper()
	args := []string{"ps", "-q", "--no-trunc", "--filter", "label=com.docker.compose.project=" +
		p.name}
	if service != "" {
		args = append(args, "--filter", "label=com.docker.compose.service="+service)
	}
	ids := strings.Fields(p.host.CLI(p.t, args...))
	slices.Sort(ids)
	return ids
}

// check asks from every container of the project: each sees the project as it is now, its own
// statistics, and nothing of anybody else's.
func (p *project) check(want int, others ...string) {
	p.t.Helper()
	ids := p.containers("")
	if len(ids) != want {
		p.t.Fatalf("project %s: got %d containers, want %d", p.name, len(ids), want)
	}
	for _, id := range ids {
		var got doc
		waitFor(p.t, "the project as it is in "+id, func() bool {
			got = taskOf(p.t, ask(p.t, p.host, id, "/v2/metadata"))
			var listed []string
			for _, c := range got.Containers {
				listed = append(listed, c.DockerId)
			}
			slices.Sort(listed)
			return slices.Equal(listed, ids)
		})
		if !strings.HasSuffix(got.TaskARN, "/"+p.name) {
			p.t.Errorf("container %.12s: got task %s, want project %s", id, got.TaskARN,
				p.name)
		}
		if code := status(p.t, p.host, id, "/v2/metadata/"+id); code != "200" {
			p.t.Errorf("container %.12s asks for itself: got %s, want 200", id, code)
		}
		for _, other := range others {
			if code := status(p.t, p.host, id, "/v2/metadata/"+other); code != "400" {
				p.t.Errorf("container %.12s asks for another project's: got %s, "+
					"want 400", id, code)
			}
			if stats := ask(p.t, p.host, id, "/v2/stats"); !strings.Contains(stats,
				id) || strings.Contains(stats, other) {
				p.t.Errorf("container %.12s asks for statistics: got %.300s", id,
					stats)
			}
		}
	}
}

// Real Compose brings a project up, scales it and replaces a container while another project runs
// beside it: every container sees its own project as it is.
func TestRootCompose(t *testing.T) {
	h := testdocker.Shared(t)
	startMetad(t, h)
	t.Logf("Compose says %s", h.Compose(t, t.TempDir(), h.Socket, "version", "--short"))
	shop := newProject(t, h, "shop", h.Socket)
	blog := newProject(t, h, "blog", h.Socket)
	others := blog.containers("")
	shop.check(3, others...)
	blog.check(3, shop.containers("")...)

	shop.compose("up", "-d", "--scale", "web=3")
	shop.check(5, others...)
	shop.compose("up", "-d", "--scale", "web=1")
	shop.check(3, others...)

	old := shop.containers("db")
	shop.compose("up", "-d", "--force-recreate", "--no-deps", "-t", "1", "db")
	if db := shop.containers("db"); len(db) != 1 || slices.Equal(db, old) {
		t.Fatalf("replace db: got %q after %q", db, old)
	}
	shop.check(3, others...)
	shop.compose("restart", "-t", "1", "cache")
	shop.check(3, others...)
	blog.check(3, shop.containers("")...)
}
