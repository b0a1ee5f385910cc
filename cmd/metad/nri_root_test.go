//go:build root

package main

import (
	"context"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/docker/docker/api/types/container"

	"metad/internal/testdocker"
	"metad/pkg/inject"
)

// startNRI starts a metad that the Engine of h asks what to put into new containers.
func startNRI(t *testing.T, h *testdocker.Host, args ...string) *process {
	t.Helper()
	h.SkipBefore(t, "29.2")
	d := newProcess(t, h)
	d.start(nriArgs(h, args...)...)
	d.waitReady()
	d.waitAsked()
	return d
}

func nriArgs(h *testdocker.Host, args ...string) []string {
	return append([]string{"--nri", "on", "--nri-socket", h.NRISocket()}, args...)
}

// waitAsked waits until the Engine asks metad.
func (d *process) waitAsked() {
	d.t.Helper()
	d.waitFor("the Engine to ask metad by NRI", func() bool {
		_, metrics, err := d.get("127.0.0.1:51683", "/metrics")
		return err == nil && strings.Contains(metrics, "\nmetad_nri_connected 1\n")
	})
}

// given says what is in a container's environment: its two URIs' one id, and its file.
func given(t testing.TB, h *testdocker.Host, id string) (endpoint, file string) {
	t.Helper()
	var v3, v4 string
	for _, e := range h.Inspect(t, id).Config.Env {
		key, value, _ := strings.Cut(e, "=")
		switch key {
		case inject.EnvURI:
			v3 = strings.TrimPrefix(value, "http://169.254.170.2/v3/")
		case inject.EnvURIV4:
			v4 = strings.TrimPrefix(value, "http://169.254.170.2/v4/")
		case "ECS_CONTAINER_METADATA_FILE":
			file = value
		}
	}
	if v3 != v4 {
		t.Errorf("container %.12s: got ids %q and %q", id, v3, v4)
	}
	return v4, file
}

// Every container gets the endpoint's address and its file, whoever creates it and with no
// DOCKER_HOST anywhere; what it says itself wins.
func TestRootNRI(t *testing.T) {
	h := testdocker.Shared(t)
	startNRI(t, h, "--container-metadata", "--metadata-uris")
	docker := func(args ...string) string {
		t.Helper()
		id := strings.TrimSpace(h.CLI(t, args...))
		t.Cleanup(func() { h.Remove(t, id) })
		return id
	}
	whole := func(what, id string) {
		t.Helper()
		endpoint, file := given(t, h, id)
		if len(endpoint) < 32 || !strings.HasPrefix(file, "/.metad/") {
			t.Errorf("%s: got id %q, file %q", what, endpoint, file)
			return
		}
		waitFor(t, what+"'s file to be READY", func() bool {
			return strings.Contains(h.Exec(t, id, "sh", "-c",
				"cat $ECS_CONTAINER_METADATA_FILE"),
				`"MetadataFileStatus": "READY"`)
		})
		if out := h.Exec(t, id, "sh", "-c",
			"grep ContainerID $ECS_CONTAINER_METADATA_FILE; echo "+
				"$ECS_CONTAINER_METADATA_URI"); !strings.Contains(out, id) ||
			!strings.Contains(out, endpoint) {
			t.Errorf("%s sees %s", what, out)
		}
		if got := containerOf(t, h.Exec(t, id, "sh", "-c",
			"wget -qO- $ECS_CONTAINER_METADATA_URI_V4")); got != id {
			t.Errorf("%s asks the address that it has: got %s, want itself", what, got)
		}
		waitFor(t, what+"'s statistics", func() bool {
			return strings.Contains(h.Exec(t, id, "sh", "-c",
				"wget -qO- $ECS_CONTAINER_METADATA_URI_V4/stats"), `"id":"`+id)
		})
		if _, code, err := h.TryExec(id, "sh", "-c",
			"echo x > $ECS_CONTAINER_METADATA_FILE"); err != nil || code == 0 {
			t.Errorf("%s could write its file: exit code %d, %v", what, code, err)
		}
	}
	run := func(args ...string) string {
		t.Helper()
		return docker(slices.Concat([]string{"run", "-d", "--stop-signal", "KILL"}, args,
			[]string{testdocker.BusyboxImage})...)
	}

	plain := run("--name", "plain")
	whole("docker run", plain)
	if endpoint, _ := given(t, h, plain); !strings.HasPrefix(endpoint, plain[:32]+"-") {
		t.Errorf("a task of one: got id %s, want the task's in front", endpoint)
	}
	created := docker("create", "--stop-signal", "KILL", testdocker.BusyboxImage)
	h.CLI(t, "start", created)
	whole("docker create", created)
	whole("a read-only container", run("--read-only"))
	whole("--volumes-from", run("--volumes-from", "plain"))

	mine := run("-e", "ECS_CONTAINER_METADATA_URI_V4=http://169.254.170.2/v4/self", "-e",
		"ECS_CONTAINER_METADATA_FILE=/mine")
	env := strings.Join(h.Inspect(t, mine).Config.Env, " ")
	if !strings.Contains(env, "/v4/self") || strings.Contains(env, "/v3/") ||
		!strings.Contains(env, "FILE=/mine") || len(h.Inspect(t, mine).Mounts) > 0 {
		t.Errorf("a container with its own variables: got %s", env)
	}
	off := run("--label", inject.LabelFile+"=false", "--label", inject.LabelURIs+"=false")
	if endpoint, file := given(t, h, off); endpoint+file != "" {
		t.Errorf("labels false: got %q, %q", endpoint, file)
	}
	// NRI does not say what a container mounts: the file lies where nothing of it can be.
	dir := t.TempDir()
	whole("a container with its own /ecs", run("-v", dir+":/ecs:ro"))
	if out, err := filepath.Glob(dir + "/*"); err != nil || len(out) > 0 {
		t.Errorf("its /ecs holds %q, %v", out, err)
	}

	shop := newProject(t, h, "nri-shop", h.Socket)
	shop.compose("up", "-d", "--scale", "web=3")
	seen := map[string]bool{}
	for _, id := range shop.containers("") {
		whole("a container of Compose", id)
		endpoint, _ := given(t, h, id)
		seen[endpoint] = true
	}
	if len(seen) != 5 {
		t.Errorf("Compose: got %d ids, want 5", len(seen))
	}
}

// Without the switches a container gets what it asks for by its labels.
func TestRootNRILabels(t *testing.T) {
	h := testdocker.Shared(t)
	startNRI(t, h)
	if endpoint, file := given(t, h, h.Create(t, testdocker.Container{})); endpoint+file != "" {
		t.Errorf("no label: got %q, %q", endpoint, file)
	}
	if endpoint,
		file := given(t, h,
		h.Create(t, testdocker.Container{Labels: map[string]string{
			inject.LabelURIs: "true"}})); endpoint == "" || file != "" {
		t.Errorf("label for the address: got %q, %q", endpoint, file)
	}
	if endpoint,
		file := given(t, h,
		h.Create(t, testdocker.Container{Labels: map[string]string{
			inject.LabelFile: "true"}})); endpoint != "" || file == "" {
		t.Errorf("label for the file: got %q, %q", endpoint, file)
	}
}

// With NRI, and without the look into containerd's directories, containers have the right answer to
// their first instruction. NRI says at a container's creation what it is; its address is known by
// the time that its first request has waited for it.
func TestRootNRIFirstInstruction(t *testing.T) {
	h := testdocker.Shared(t)
	nowhere := filepath.Join(t.TempDir(), "none")
	firstInstructions(t, h, startNRI(t, h, "--metadata-uris", "--bundle-dirs", nowhere))
}

// creation is one container of a crowd.
type creation struct {
	id         string
	begin, end time.Time
}

// createCrowd creates n containers, width at a time. All must come about.
func createCrowd(t *testing.T, h *testdocker.Host, n, width int) []creation {
	t.Helper()
	all := make([]creation, n)
	next := make(chan int)
	var wg sync.WaitGroup
	for range width {
		wg.Go(func() {
			for i := range next {
				c := creation{begin: time.Now()}
				created, err := h.Client.ContainerCreate(context.Background(),
					&container.Config{Image: testdocker.BusyboxImage},
					&container.HostConfig{NetworkMode: "none"}, nil, nil, "")
				if err != nil {
					t.Errorf("create container %d: %v", i, err)
					continue
				}
				c.id, c.end = created.ID, time.Now()
				all[i] = c
			}
		})
	}
	for i := range n {
		next <- i
	}
	close(next)
	wg.Wait()
	t.Cleanup(func() {
		for _, c := range all {
			if c.id != "" {
				h.Remove(t, c.id)
			}
		}
	})
	return all
}

// times says how long the creations took.
func times(all []creation) string {
	took := make([]time.Duration, len(all))
	for i, c := range all {
		took[i] = c.end.Sub(c.begin)
	}
	slices.Sort(took)
	return fmt.Sprintf("median %v, the longest %v", took[len(took)/2].Round(time.Millisecond),
		took[len(took)-1].Round(time.Millisecond))
}

// span is a time in which something was so.
type span struct{ begin, end time.Time }

// asked returns the times in which the Engine asked the process, by its log. What is in flight when
// the guard hangs up is lost, and the log may be late with it: a second before that does not count.
// ended is when the process was ended, if it was not by itself.
func (d *process) asked(ended time.Time) (spans []span) {
	var begin time.Time
	end := func(t time.Time) {
		if !begin.IsZero() {
			spans = append(spans, span{begin, t})
			begin = time.Time{}
		}
	}
	for line := range strings.Lines(d.out.String()) {
		stamp, text, _ := strings.Cut(line, " ")
		at, err := time.Parse("2006-01-02T15:04:05.000Z0700", stamp)
		switch {
		case err != nil:
		case strings.Contains(text, "nri connected to the Docker"):
			begin = at
		case strings.Contains(text, "nri NRI connection to the Docker Engine ended"):
			end(at.Add(-time.Second))
		case strings.Contains(text, "nri disconnecting"):
			end(at)
		}
	}
	end(ended)
	return spans
}

// joined returns the spans with those that overlap made one.
func joined(spans []span) (out []span) {
	slices.SortFunc(spans, func(a, b span) int { return a.begin.Compare(b.begin) })
	for _, s := range spans {
		if n := len(out); n > 0 && !s.begin.After(out[n-1].end) {
			if s.end.After(out[n-1].end) {
				out[n-1].end = s.end
			}
			continue
		}
		out = append(out, s)
	}
	return out
}

// Containers are created 20 at a time while metad is killed, stopped and taken over: all come
// about, every one that was created while the Engine asked metad has its address, and a takeover
// has no gap.
func TestRootNRIWithoutMetad(t *testing.T) {
	const n, width = 200, 20
	h := testdocker.Start(t) // its creations are timed
	h.SkipBefore(t, "29.2")
	t.Logf("%d creations without metad: %s", n, times(createCrowd(t, h, n, width)))
	args := nriArgs(h, "--metadata-uris")
	d := startNRI(t, h, "--metadata-uris")
	t.Logf("%d creations with metad: %s", n, times(createCrowd(t, h, n, width)))

	var all []creation
	created := make(chan struct{})
	go func() {
		defer close(created)
		all = createCrowd(t, h, n, width)
	}()
	var asked, stopped []span
	troubles := map[string][]span{} // what was done to metad, until the Engine asked it again
	kills, takeovers, late := 0, 0, 0
	for round := 0; ; round++ {
		select {
		case <-created:
		default:
			began := time.Now()
			kind := []string{"kill", "stop", "takeover"}[round%3]
			switch kind {
			case "kill":
				killed := time.Now()
				d.kill()
				asked = append(asked, d.asked(killed)...)
				d.start(args...)
				kills++
			case "stop":
				_ = d.cmd.Process.Signal(syscall.SIGSTOP)
				time.Sleep(300 * time.Millisecond) // the state under test
				_ = d.cmd.Process.Signal(syscall.SIGCONT)
				stopped = append(stopped, span{began, time.Now().Add(time.Second)})
			case "takeover":
				old := *d
				d.start(args...)
				<-old.done
				before := old.asked(time.Now())
				asked = append(asked, before...)
				takeovers++
				if now := d.asked(time.Now()); strings.Contains(d.out.String(),
					"taking over without waiting") || len(now) == 0 ||
					len(before) == 0 {
					// the machine was too busy for the Engine to ask in time
					late++
				} else if last := before[len(before)-1].end; now[0].begin.After(
					last) {
					t.Errorf("a takeover left the Engine alone for %v",
						now[0].begin.Sub(last))
				}
			}
			d.waitReady()
			d.waitAsked()
			troubles[kind] = append(troubles[kind], span{began, time.Now()})
			continue
		}
		break
	}
	asked = joined(append(asked, d.asked(time.Now())...))
	within := func(c creation, spans []span) bool {
		return slices.ContainsFunc(spans, func(s span) bool {
			return c.begin.After(s.begin) && c.end.Before(s.end)
		})
	}
	touches := func(c creation, spans []span) bool {
		return slices.ContainsFunc(spans, func(s span) bool {
			return c.begin.Before(s.end) && c.end.After(s.begin)
		})
	}
	for kind, spans := range troubles {
		var met []creation
		for _, c := range all {
			if touches(c, spans) {
				met = append(met, c)
			}
		}
		if len(met) > 0 {
			t.Logf("%d of them met a %s: %s", len(met), kind, times(met))
		}
	}
	var with, excused, missing int
	for _, c := range all {
		endpoint, _ := given(t, h, c.id)
		switch {
		case endpoint != "":
			with++
		case within(c, asked) && !touches(c, stopped):
			missing++
		default:
			excused++
		}
	}
	t.Logf("%d creations during %d kills, %d stops and %d takeovers (%d of them late): %s; "+
		"%d with the address, %d without while the Engine did not ask metad, %d others "+
		"without",
		n, kills, len(stopped), takeovers, late, times(all), with, excused, missing)
	if missing > 0 || with == 0 {
		t.Errorf("%d containers are without the address although metad answered, %d "+
			"with it", missing, with)
	}
}
