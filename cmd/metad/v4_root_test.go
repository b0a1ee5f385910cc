//go:build root

package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/docker/docker/api/types/container"
	"github.com/docker/docker/api/types/events"

	"metad/internal/testdocker"
)

// v4Doc is a container in a task's document of v4.
type v4Doc struct {
	DockerId, DockerName, KnownStatus, LogDriver string
	LogOptions                                   map[string]string
	RestartCount                                 *int
	Health                                       struct{ Status string }
	Networks                                     json.RawMessage
}

// phase says how far the life of a container with a health check has come in a document.
func (c v4Doc) phase() string {
	if c.KnownStatus == "RUNNING" && c.Health.Status == "HEALTHY" {
		return "HEALTHY"
	}
	return c.KnownStatus
}

// streamLine is a line of a stream of a task's document, and when it came.
type streamLine struct {
	at   time.Time
	task struct{ Containers []v4Doc }
}

// followTask has a container stream its task's document. The stream ends with the test.
func followTask(t *testing.T, h *testdocker.Host, id string) <-chan streamLine {
	t.Helper()
	// HTTP/1.0: one line of the answer is one document. The sleep keeps the client's side open.
	cmd := h.CLICommand("exec", id, "sh", "-c",
		`{ printf 'GET /v4/task?stream=true HTTP/1.0\r\n\r\n'; sleep 3600; } | nc 169.254.170.2 80`)
	out, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	found := make(chan streamLine, 100)
	go func() {
		defer close(found)
		lines := bufio.NewScanner(out)
		lines.Buffer(nil, 1<<20)
		for lines.Scan() {
			line := streamLine{at: time.Now()}
			// else it is of the answer's head
			if json.Unmarshal(lines.Bytes(), &line.task) == nil {
				found <- line
			}
		}
	}()
	return found
}

// A container that streams its task's document sees its sibling start, turn healthy and stop, in
// this order, without asking again.
func TestRootStreamTask(t *testing.T) {
	h := testdocker.Shared(t)
	startMetad(t, h)
	labels := map[string]string{"com.docker.compose.project": "stream",
		"com.docker.compose.service": "web"}
	web := h.Run(t, testdocker.Container{Labels: labels})
	waitFor(t, "its own document", func() bool {
		out, code, err := h.TryExec(web, "wget", "-qO-", "http://169.254.170.2/v4/task")
		return err == nil && code == 0 && strings.Contains(out, web)
	})
	lines := followTask(t, h, web)
	if first := <-lines; len(first.task.Containers) != 1 ||
		first.task.Containers[0].DockerId != web {
		t.Fatalf("first line: got %+v", first)
	}
	db := h.Create(t,
		testdocker.Container{Labels: map[string]string{
			"com.docker.compose.project": "stream", "com.docker.compose.service": "db"},
			Configure: func(c *container.Config, _ *container.HostConfig) {
				c.Healthcheck = &container.HealthConfig{Test: []string{"CMD",
					"test", "-e", "/tmp/healthy"}, Interval: 100 * time.Millisecond, Retries: 1 << 20}
			}})
	told, _ := h.Client.Events(t.Context(), events.ListOptions{})
	until := func(phase string, action events.Action) {
		t.Helper()
		seen := awaitPhase(t, lines, web, db, phase)
		for e := range told {
			if e.Actor.ID == db && e.Action == action {
				t.Logf("%s is seen %v after Docker's event", phase,
					seen.Sub(time.Unix(0, e.TimeNano)).Round(time.Microsecond))
				return
			}
		}
		t.Errorf("no event %s", action)
	}
	h.StartContainer(t, db)
	until("RUNNING", events.ActionStart)
	h.Exec(t, db, "touch", "/tmp/healthy")
	until("HEALTHY", events.ActionHealthStatusHealthy)
	if err := h.Client.ContainerStop(t.Context(), db, container.StopOptions{}); err != nil {
		t.Fatal(err)
	}
	until("STOPPED", events.ActionDie)
}

// awaitPhase reads lines until the sibling db is in the phase, and returns when that line came. No
// line is without web, or has db in a phase that comes later.
func awaitPhase(t *testing.T, lines <-chan streamLine, web, db, phase string) time.Time {
	t.Helper()
	order := map[string]int{"": 0, "CREATED": 1, "RUNNING": 2, "HEALTHY": 3, "STOPPED": 4}
	for end := time.After(time.Minute); ; {
		select {
		case line, ok := <-lines:
			if !ok {
				t.Fatalf("the stream ended before %s", phase)
			}
			all := map[string]string{}
			for _, c := range line.task.Containers {
				all[c.DockerId] = c.phase()
			}
			if all[web] != "RUNNING" || order[all[db]] > order[phase] {
				t.Fatalf("before %s: got %v", phase, all)
			}
			if all[db] == phase {
				return line.at
			}
		case <-end:
			t.Fatalf("no line says %s", phase)
		}
	}
}

// The host's view is for a container that was given the label at its creation. One that has the
// label from its image does not see it.
func TestRootHostTasksByImage(t *testing.T) {
	h := testdocker.Shared(t)
	startMetad(t, h)
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "Dockerfile"),
		[]byte("FROM "+testdocker.BusyboxImage+"\nLABEL metad.host-tasks=true\n"),
		0o600); err != nil {
		t.Fatal(err)
	}
	h.CLI(t, "build", "-t", "nosy:latest", dir)
	nosy := h.Run(t, testdocker.Container{Image: "nosy:latest"})
	trusted := h.Run(t,
		testdocker.Container{Labels: map[string]string{"metad.host-tasks": "true"}})
	waitFor(t, "the host's view", func() bool {
		out, code, err := h.TryExec(trusted, "wget", "-qO-",
			"http://169.254.170.2/v4/tasks")
		return err == nil && code == 0 && strings.Contains(out, nosy) &&
			strings.Contains(out, trusted)
	})
	for _, path := range []string{"/v4/tasks", "/v4/self/tasks", "/v4/tasks/stats"} {
		if code := status(t, h, nosy, path); code != "404" {
			t.Errorf("label of the image, %s: got %s, want 404", path, code)
		}
	}
	if got := ask(t, h, nosy, "/v4"); strings.Contains(got, "metad.host-tasks") {
		t.Errorf("its document shows the label: %s", got)
	}
}

// What a v4 document says of containers with a restart policy, a log driver of AWS, the host's
// network and none is what the Engine does with them.
func TestRootV4Documents(t *testing.T) {
	h := testdocker.Shared(t)
	startMetad(t, h)
	view := h.Run(t,
		testdocker.Container{Labels: map[string]string{"metad.host-tasks": "true"}})
	restarted := h.Run(t, testdocker.Container{Cmd: []string{"false"},
		Configure: func(_ *container.Config, host *container.HostConfig) {
			host.RestartPolicy = container.RestartPolicy{
				Name: container.RestartPolicyOnFailure, MaximumRetryCount: 2}
		}})
	logs := func(options map[string]string) string {
		return h.Create(t, testdocker.Container{Configure: func(_ *container.Config,
			host *container.HostConfig) {
			host.LogConfig = container.LogConfig{Type: "awslogs", Config: options}
		}})
	}
	group := map[string]string{"awslogs-group": "g", "awslogs-region": "eu-central-1"}
	byID := logs(group)
	byTag := logs(map[string]string{"awslogs-group": "g", "awslogs-region": "eu-central-1",
		"tag": "{{.Name}}"})
	onHost := h.Run(t, testdocker.Container{Network: "host"})
	alone := h.Run(t, testdocker.Container{Network: "none"})

	shown := func(id string) (found v4Doc) {
		out, code, err := h.TryExec(view, "wget", "-qO-", "http://169.254.170.2/v4/tasks")
		if err != nil || code != 0 {
			return
		}
		var tasks []struct{ Containers []v4Doc }
		if err := json.Unmarshal([]byte(out), &tasks); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		for _, tk := range tasks {
			for _, c := range tk.Containers {
				if c.DockerId == id {
					found = c
				}
			}
		}
		return found
	}
	until := func(what, id string, ok func(v4Doc) bool) {
		t.Helper()
		var last v4Doc
		waitFor(t, what, func() bool { last = shown(id); return ok(last) })
		t.Logf("%s: networks %s", what, last.Networks)
	}
	until("two restarts", restarted, func(c v4Doc) bool { return c.RestartCount != nil && *c.RestartCount == 2 && c.KnownStatus == "STOPPED" })
	until("awslogs, whose stream is the container's id", byID, func(c v4Doc) bool {
		return c.LogDriver == "awslogs" && c.LogOptions["awslogs-group"] == "g" &&
			c.LogOptions["awslogs-stream"] == byID
	})
	until("awslogs, whose stream nobody knows", byTag, func(c v4Doc) bool { return c.DockerId == byTag && c.LogDriver == "" && c.LogOptions == nil })
	until("the host's network", onHost, func(c v4Doc) bool {
		return string(c.Networks) == `[{"NetworkMode":"host","IPv4Addresses":[""]}]` &&
			c.RestartCount == nil && c.LogDriver == "json-file"
	})
	until("no network", alone, func(c v4Doc) bool {
		return c.KnownStatus == "RUNNING" &&
			string(c.Networks) == `[{"NetworkMode":"none","IPv4Addresses":[""]}]`
	})
}

// A container that asks as its very first instruction finds itself and its task in v4.
func TestRootV4FirstInstruction(t *testing.T) {
	h := testdocker.Shared(t)
	startMetad(t, h)
	for _, path := range []string{"/v4", "/v4/task", "/v3", "/v3/task", "/v4/self"} {
		id := h.Run(t, testdocker.Container{Cmd: []string{"wget", "-qO-",
			"http://169.254.170.2" + path}})
		if code, out := exitOf(t, h, id); code != 0 ||
			!strings.Contains(out, `"DockerId":"`+id+`"`) {
			t.Errorf("%s: got exit code %d, %s", path, code, out)
		}
	}
}

// With --introspection metad is what asks there think it is: the ECS agent's introspection API.
func TestRootIntrospection(t *testing.T) {
	h := testdocker.Shared(t)
	const at = "127.0.0.1:51678"
	d := startMetad(t, h, "--introspection", at, "--cluster", "shop")
	id := h.Run(t, testdocker.Container{Name: "introspected"})
	got := func(path string) string {
		code, body, err := d.get(at, path)
		if err != nil || code != 200 {
			return fmt.Sprintf("%d %s %v", code, body, err)
		}
		return body
	}
	waitFor(t, "the container", func() bool { return strings.Contains(got("/v1/tasks?dockerid="+id), `"DockerId":"`+id+`"`) })
	if body := got("/v1/metadata"); !strings.Contains(body, `"Cluster":"shop"`) ||
		!strings.Contains(body, `"Version":"metad`) {
		t.Errorf("metadata: got %s", body)
	}
	one := got("/v1/tasks?dockerid=" + id[:12])
	var tk struct{ Arn, Family string }
	if err := json.Unmarshal([]byte(one), &tk); err != nil || tk.Family != "introspected" {
		t.Errorf("by the short id: got %s", one)
	}
	if body := got("/v1/tasks?taskarn=" + tk.Arn); body != one {
		t.Errorf("by ARN: got %s, want %s", body, one)
	}
	var all struct{ Tasks []struct{ Arn string } }
	if err := json.Unmarshal([]byte(got("/v1/tasks")), &all); err != nil ||
		len(all.Tasks) != 1 {
		t.Errorf("all: got %+v", all)
	}
	if code, body, err := d.get(at, "/v1/tasks?dockerid=nobody"); err != nil || code == 200 {
		t.Errorf("unknown id: got %d %s %v", code, body, err)
	}
}
