//go:build root

package main

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/docker/docker/api/types/container"
	"github.com/docker/docker/client"
	"github.com/vishvananda/netns"
	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"metad/internal/testdocker"
	"metad/internal/testnet"
	"metad/pkg/mdfile"
	"metad/pkg/snapshot"
)

const probeImage = "metad-probe:latest"

// importProbe puts internal/probe into an image of h.
func importProbe(t testing.TB, h *testdocker.Host) {
	t.Helper()
	h.ImageFromBinary(t, probeImage, testdocker.Build(t, "metad/internal/probe"))
}

type doc struct {
	TaskARN    string
	Containers []struct{ DockerId, Name, Type string }
}

func taskOf(t testing.TB, body string) doc {
	t.Helper()
	var d doc
	if err := json.Unmarshal([]byte(body), &d); err != nil {
		t.Fatalf("not a task document: %v: %s", err, body)
	}
	return d
}

// M01, M12, C01, C09, S01, S09: two tasks on one bridge see themselves and nobody else.
func TestRootTwoTasksOnOneBridge(t *testing.T) {
	h := testdocker.Shared(t)
	one := h.RunTask(t, testdocker.Task{ID: "one",
		Containers: []testdocker.Container{{Name: "app"}, {Name: "sidecar"}}})
	startMetad(t, h)
	// after metad
	two := h.RunTask(t,
		testdocker.Task{ID: "two", Containers: []testdocker.Container{{Name: "app"}}})

	for _, tt := range []struct{ self, other testdocker.RunningTask }{{one, two}, {two, one}} {
		self, other := tt.self.Containers[0], tt.other.Containers[0]
		got := taskOf(t, ask(t, h, self, "/v2/metadata"))
		if got.TaskARN != tt.self.ARN || len(got.Containers) != len(tt.self.Containers)+1 {
			t.Errorf("%s: got %+v", tt.self.ARN, got)
		}
		if code := status(t, h, self, "/v2/metadata/"+self); code != "200" {
			t.Errorf("own container: got %s, want 200", code)
		}
		if code := status(t, h, self, "/v2/metadata/"+other); code != "400" {
			t.Errorf("the other task's container: got %s, want 400", code)
		}
		if code := status(t, h, self, "/v2/stats/"+other); code != "400" {
			t.Errorf("the other task's statistics: got %s, want 400", code)
		}
		stats := ask(t, h, self, "/v2/stats")
		if !strings.Contains(stats, self) || strings.Contains(stats, other) {
			t.Errorf("statistics: got %.300s", stats)
		}
	}
}

// M12, M13, N01: the shape the agent makes; the pause container is listed.
func TestRootAWSVPC(t *testing.T) {
	h := testdocker.Shared(t)
	startMetad(t, h)
	task := h.RunTask(t,
		testdocker.Task{ID: "vpc",
			ENI:        []netip.Prefix{netip.MustParsePrefix("10.0.0.7/24")},
			Containers: []testdocker.Container{{Name: "app"}}})
	got := taskOf(t, ask(t, h, task.Containers[0], "/v2/metadata"))
	types := map[string]string{}
	for _, c := range got.Containers {
		types[c.Type] = c.DockerId
	}
	if got.TaskARN != task.ARN || len(got.Containers) != 2 ||
		types["CNI_PAUSE"] != task.Pause || types["NORMAL"] != task.Containers[0] {
		t.Errorf("got %+v, want pause %s and app %s of %s", got, task.Pause,
			task.Containers[0], task.ARN)
	}
	if body := ask(t, h, task.Containers[0], "/v2/metadata/"+task.Pause); !strings.Contains(
		body, `"KnownStatus":"RESOURCES_PROVISIONED"`) {
		t.Errorf("pause: got %s", body)
	}
	if body := ask(t, h, task.Containers[0], "/v2/metadata"); !strings.Contains(body,
		`"Networks":[{"NetworkMode":"awsvpc","IPv4Addresses":["10.0.0.7"]}]`) {
		t.Errorf("networks: got %s", body)
	}
}

// A plain container on docker0, one on a bridge the user made, no route added; a Compose project.
func TestRootDockerNetworks(t *testing.T) {
	h := testdocker.Shared(t)
	startMetad(t, h)
	h.CreateBridge(t, "br-user", netip.MustParsePrefix("10.77.0.0/24"))
	compose := map[string]string{"com.docker.compose.project": "shop",
		"com.docker.compose.service": "web"}
	plain := h.Run(t, testdocker.Container{})
	user := h.Run(t, testdocker.Container{Network: "br-user"})
	web := h.Run(t, testdocker.Container{Network: "br-user", Labels: compose})
	compose["com.docker.compose.service"] = "db"
	db := h.Run(t, testdocker.Container{Network: "br-user", Labels: compose})

	for _, id := range []string{plain, user} {
		got := taskOf(t, ask(t, h, id, "/v2/metadata"))
		if len(got.Containers) != 1 || got.Containers[0].DockerId != id ||
			strings.Count(got.TaskARN, ":") != 5 {
			t.Errorf("container %.12s: got %+v", id, got)
		}
		if route := h.Exec(t, id, "ip", "route"); strings.Contains(route, "169.254") {
			t.Errorf("a route was added: %s", route)
		}
	}
	for _, id := range []string{web, db} {
		if got := taskOf(t, ask(t, h, id, "/v2/metadata")); len(got.Containers) != 2 {
			t.Errorf("compose: got %+v, want web and db", got)
		}
	}
}

// E04: a process of the host is no task.
func TestRootHostProcess(t *testing.T) {
	h := testdocker.Shared(t)
	d := startMetad(t, h)
	code, body, err := d.get("169.254.170.2:80", "/v2/metadata")
	if err != nil || code != 400 || !strings.Contains(body, "unable to associate") {
		t.Errorf("host process: got %d %q %v, want 400", code, body, err)
	}
}

// X01: the original sample application, in a task that was just started.
func TestRootX01Validator(t *testing.T) {
	h := testdocker.Shared(t)
	importProbe(t, h)
	startMetad(t, h)
	for i := range 5 {
		task := h.RunTask(t, testdocker.Task{ID: fmt.Sprintf("x01-%d", i),
			Containers: []testdocker.Container{{Name: "validator", Image: probeImage,
				Cmd: []string{"validate"}}}})
		if code, out := exitOf(t, h, task.Containers[0]); code != 42 {
			t.Errorf("validator: got exit code %d, want 42: %s", code, out)
		}
	}
}

// exitOf waits for a container to end and returns its exit code and output.
func exitOf(t testing.TB, h *testdocker.Host, id string) (code int, out string) {
	t.Helper()
	waitFor(t, "container to end", func() bool {
		c := h.Inspect(t, id)
		code = c.State.ExitCode
		return c.State.Status == "exited"
	})
	return code, h.CLI(t, "logs", id)
}

// K03: the AWS SDK in a container gets its credentials from the agent, through metad.
func TestRootK03SDKCredentials(t *testing.T) {
	h := testdocker.Shared(t)
	importProbe(t, h)
	startAgent(t, h, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/v2/credentials/c0ffee" {
			http.NotFound(w, r)
			return
		}
		w.Header().Set("Content-Type", "application/json")
		fmt.Fprint(w,
			`{"RoleArn":"arn:aws:iam::111122223333:role/r","AccessKeyId":"AKIDEXAMPLE","SecretAccessKey":"s","Token":"t","Expiration":"2099-01-01T00:00:00Z"}`)
	}))
	startMetad(t, h)
	task := h.RunTask(t,
		testdocker.Task{ID: "k03", Containers: []testdocker.Container{{Name: "sdk",
			Image: probeImage, Cmd: []string{"credentials"},
			Env: []string{
				"AWS_CONTAINER_CREDENTIALS_RELATIVE_URI=/v2/credentials/c0ffee"}}}})
	if code, out := exitOf(t, h, task.Containers[0]); code != 0 ||
		!strings.Contains(out, "AKIDEXAMPLE") {
		t.Errorf("SDK: got exit code %d, %s", code, out)
	}
}

// 200 containers ask as their very first instruction, while metad hears of them from Docker.
func TestRootFirstInstruction(t *testing.T) {
	h := testdocker.Shared(t)
	firstInstructions(t, h, startMetad(t, h))
}

// firstInstructions starts containers that ask metad with their first instruction.
func firstInstructions(t *testing.T, h *testdocker.Host, d *process) {
	t.Helper()
	const n = 200
	importProbe(t, h)
	threads, err := os.ReadDir(fmt.Sprintf("/proc/%d/task", d.cmd.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	for _, thread := range threads { // Nice= of the unit; later threads inherit it
		id, _ := strconv.Atoi(thread.Name())
		if err := unix.Setpriority(unix.PRIO_PROCESS, id, -10); err != nil {
			t.Fatal(err)
		}
	}
	ids := make([]string, n)
	for i := range ids {
		ids[i] = h.Create(t, testdocker.Container{Image: probeImage, Cmd: []string{"first"},
			Network: h.ECSNetwork(t),
			Labels: map[string]string{"com.amazonaws.ecs.task-arn": fmt.Sprintf(
				"arn:aws:ecs:us-west-2:111122223333:task/default/first-%d", i),
				"com.amazonaws.ecs.container-name": "first", "com.amazonaws.ecs.task-definition-version": "1"}})
	}
	var wg sync.WaitGroup
	next := make(chan string)
	for range 8 {
		wg.Go(func() {
			for id := range next {
				if err := h.Client.ContainerStart(t.Context(), id,
					container.StartOptions{}); err != nil {
					t.Error(err)
				}
			}
		})
	}
	for _, id := range ids {
		next <- id
	}
	close(next)
	wg.Wait()
	var right, wrong, refused, failed int
	for i, id := range ids {
		_, out := exitOf(t, h, id)
		switch {
		case strings.HasPrefix(out, "200 ") &&
			strings.Contains(out, fmt.Sprintf("/first-%d\"", i)):
			right++
		case strings.HasPrefix(out, "200 "):
			wrong++
			t.Errorf("container %d got another task's answer: %s", i, out)
		case strings.HasPrefix(out, "400 "):
			refused++
			t.Logf("container %d (%.12s): %s", i, id, out)
		default:
			failed++
			t.Logf("container %d: %s", i, out)
		}
	}
	t.Logf("first instruction: %d containers, %d right, %d wrong, %d times 400, %d failed", n,
		right, wrong, refused, failed)
	if right != n {
		t.Errorf("got %d right answers of %d", right, n)
	}
}

// E08: known tasks are answered after kill -9 and a start with the Docker Engine away.
func TestRootE08RestartWithoutDocker(t *testing.T) {
	h := testdocker.Start(t) // its Engine is stopped: not the shared one
	d := startMetad(t, h)
	task := h.RunTask(t,
		testdocker.Task{ID: "e08", Containers: []testdocker.Container{{Name: "app"}}})
	ask(t, h, task.Containers[0], "/v2/metadata")
	waitFor(t, "snapshot with a sample of each container", func() bool {
		sampled := 0
		for _, s := range snapshot.Read(filepath.Join(d.dir, "run"), zap.NewNop()) {
			for _, c := range s.Task.Containers {
				if s.Task.ARN == task.ARN && c.Stats.Load() != nil {
					sampled++
				}
			}
		}
		return sampled == 2 // its pause container's too
	})
	d.kill()
	pid := h.Inspect(t, task.Containers[0]).State.Pid
	h.StopDocker(t)
	d.start()
	waitFor(t, "answer while Docker is away", func() bool {
		out, err := exec.Command("nsenter", "-n", "-t", fmt.Sprint(pid), "busybox", "wget",
			"-qO-", "http://169.254.170.2/v2/metadata").Output()
		return err == nil && strings.Contains(string(out), task.ARN)
	})
	h.StartDocker(t)
	d.waitReady()
	if got := taskOf(t, ask(t, h, task.Containers[0],
		"/v2/metadata")); got.TaskARN != task.ARN {
		t.Errorf("after Docker came back: got %+v", got)
	}
	if stats := ask(t, h, task.Containers[0], "/v2/stats"); strings.Contains(stats, "null") {
		t.Errorf("statistics after a restart: got %.300s", stats)
	}
}

func readFile(name string) string {
	b, _ := os.ReadFile(name)
	return string(b)
}

// The commands that look at a running metad, and what SIGTERM leaves.
func TestRootCommands(t *testing.T) {
	h := testdocker.Shared(t)
	d := startMetad(t, h)
	task := h.RunTask(t,
		testdocker.Task{ID: "cmds", Containers: []testdocker.Container{{Name: "app"}}})
	ask(t, h, task.Containers[0], "/v2/stats")
	if out, code := d.run("tasks", "--run-dir", d.runDir()); code != 0 ||
		!strings.Contains(out, "cmds") || !strings.Contains(out, task.Port.Addr.String()) {
		t.Errorf("tasks: got %d\n%s", code, out)
	}
	waitFor(t, "a sample in top", func() bool {
		out, code := d.run("top", "--once", "--run-dir", d.runDir())
		return code == 0 && strings.Contains(out, "cmds/app")
	})
	s, err := running(d.runDir()).Snapshot(t.Context())
	if err != nil || s.Requests == 0 || s.Tasks.Tasks[0].Endpoints[0].Connections == 0 {
		t.Errorf("what top shows: got %+v, %v", s, err)
	}
	l, err := running(d.runDir()).Look(t.Context(), task.Containers[0])
	if err != nil || len(l.Steps) == 0 || !strings.Contains(string(l.Document), task.ARN) {
		t.Errorf("what top shows of a container: got %+v, %v", l, err)
	}
	if code, body, err := d.get("127.0.0.1:51683", "/metrics"); err != nil || code != 200 ||
		!strings.Contains(body, `metad_verdicts_total{verdict="port_task"}`) {
		t.Errorf("metrics: got %d %v %.2000s", code, err, body)
	}
	waitFor(t, "the answer in the metrics, and the container's first", func() bool {
		_, body, err := d.get("127.0.0.1:51683", "/metrics")
		return err == nil &&
			strings.Contains(body, "\nmetad_first_answer_seconds_count 1\n") &&
			strings.Contains(body,
				"\nmetad_requests_total{route=\"/v2/stats\",status=\"2xx\"} 1\n")
	})
	if code, body, err := d.get("127.0.0.1:51683", "/tasks"); err != nil || code != 404 {
		t.Errorf("tasks by TCP: got %d %v %.200s, want 404", code, err, body)
	}
	if code := d.stop(); code != 0 {
		t.Errorf("SIGTERM: got exit code %d, want 0", code)
	}
	out, err := d.host.Command("ip", "-br", "link", "show", "metad0").CombinedOutput()
	if err == nil {
		t.Errorf("metad0 is left: %s", out)
	}
	if out, code := d.run("detach", "--pin-dir", d.pins); code != 0 {
		t.Errorf("detach: got %d %s", code, out)
	}
	if left, _ := filepath.Glob(filepath.Join(d.pins, "*")); len(left) > 0 {
		t.Errorf("pins are left after detach: %s", left)
	}
	if _, code := d.run("detach", "--pin-dir", d.pins); code != 0 {
		t.Errorf("second detach: got %d, want 0", code)
	}
}

// S03: both sources answer, and a stream has a line for each new sample.
func TestRootStatisticsSources(t *testing.T) {
	h := testdocker.Shared(t)
	id := h.Run(t, testdocker.Container{})
	for _, source := range []string{"cgroup", "docker"} {
		t.Run(source, func(t *testing.T) {
			startMetad(t, h, "--stats-source", source)
			waitFor(t, "a sample", func() bool {
				return strings.Contains(ask(t, h, id, "/v2/stats/"+id),
					`"cpu_stats":{"cpu_usage":{"total_usage":`)
			})
			out, _, err := h.TryExec(id, "timeout", "4", "wget", "-qO-",
				"http://169.254.170.2/v2/stats/"+id+"?stream=true")
			if err != nil {
				t.Fatal(err)
			}
			lines := strings.Split(strings.TrimSpace(out), "\n")
			reads := map[string]bool{}
			for _, line := range lines {
				var sample struct{ Read, ID string }
				if err := json.Unmarshal([]byte(line), &sample); err != nil ||
					sample.ID != id {
					t.Fatalf("line of the stream: %v: %.200s", err, line)
				}
				reads[sample.Read] = true
			}
			if len(reads) < 2 || len(reads) != len(lines) {
				t.Errorf("4 seconds of the stream: got %d lines, %d different "+
					"samples", len(lines), len(reads))
			}
		})
	}
}

// One getsockopt per connection and no bpf call per request, counted by strace.
func TestRootSystemCallsPerRequest(t *testing.T) {
	const requests = 200
	h := testdocker.Shared(t)
	d := startMetad(t, h)
	task := h.RunTask(t, testdocker.Task{ID: "calls",
		Containers: []testdocker.Container{{Name: "app"}}})
	ask(t, h, task.Containers[0], "/v2/metadata")

	trace := filepath.Join(t.TempDir(), "trace")
	strace := exec.Command("strace", "-f", "-q", "-e", "trace=getsockopt,bpf,read,write", "-o",
		trace, "-p", fmt.Sprint(d.cmd.Process.Pid))
	if err := strace.Start(); err != nil {
		t.Fatal(err)
	}
	ns, err := netns.GetFromPid(h.Inspect(t, task.Pause).State.Pid)
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	waitFor(t, "strace to see a request", func() bool {
		ask(t, h, task.Containers[0], "/v2/metadata")
		return strings.Contains(readFile(trace), "/v2/metadata")
	})
	before := readFile(trace)
	c, err := testnet.Dial(ns, "", testnet.Endpoint, 5*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	for i := range requests {
		if code, body, err := testnet.GetOn(c, "/v2/metadata", 5*time.Second); err != nil ||
			code != 200 || !strings.Contains(body, task.ARN) {
			t.Fatalf("request %d: got %d %v %s", i, code, err, body)
		}
	}
	if err := strace.Process.Signal(os.Interrupt); err != nil {
		t.Fatal(err)
	}
	_ = strace.Wait() // ends by the signal
	calls := strings.TrimPrefix(readFile(trace), before)
	marks, bpfs, asked := strings.Count(calls, "SO_MARK"), strings.Count(calls, "bpf("),
		strings.Count(calls, `"GET /v2/metadata`)
	if marks != 1 || bpfs != 0 || asked != requests {
		t.Errorf("%d requests on one connection: got %d reads of a request, %d "+
			"getsockopt(SO_MARK), want 1, and %d bpf(), want 0", requests, asked, marks,
			bpfs)
	}
}

// dockerAt returns a function that runs the docker command against socket and returns what it
// prints.
func dockerAt(t *testing.T, h *testdocker.Host, socket string) func(args ...string) string {
	return func(args ...string) string {
		t.Helper()
		cmd := h.CLICommand(args...)
		cmd.Env = append(cmd.Env, "DOCKER_HOST=unix://"+socket)
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("docker %q: %v: %s", args, err, out)
		}
		return strings.TrimSpace(string(out))
	}
}

// The metadata file, end to end: created by the docker command through the proxy, READY once it
// runs.
func TestRootMetadataFile(t *testing.T) {
	h := testdocker.Shared(t)
	socket := filepath.Join(t.TempDir(), "docker.sock")
	startMetad(t, h, "--docker-proxy", socket, "--container-metadata")
	docker := dockerAt(t, h, socket)
	id := docker("run", "-d", "--name", "with-file", "--network", h.ECSNetwork(t),
		testdocker.BusyboxImage)
	t.Cleanup(func() { h.Remove(t, id) })
	var file string
	waitFor(t, "file to be READY", func() bool {
		file = h.Exec(t, id, "sh", "-c", "cat $ECS_CONTAINER_METADATA_FILE")
		return strings.Contains(file, `"MetadataFileStatus": "READY"`)
	})
	addr := h.Inspect(t, id).NetworkSettings.Networks[testdocker.ECSBridge].IPAddress
	if !strings.Contains(file, id) || !strings.Contains(file, addr) {
		t.Errorf("file lacks the id or the address %s:\n%s", addr, file)
	}
	if _, code, err := h.TryExec(id, "sh", "-c",
		"echo x > $ECS_CONTAINER_METADATA_FILE"); err != nil || code == 0 {
		t.Errorf("the container could write its file: exit code %d, %v", code, err)
	}
}

// F01, proposal 001: off by default, on for the host by the agent's variable, the label wins over
// either, a bind at /ecs over all. An entrypoint waits with `metad wait-file`. What happens while
// metad is away is in the file afterwards.
func TestRootMetadataFileSwitches(t *testing.T) {
	h := testdocker.Shared(t)
	socket := filepath.Join(t.TempDir(), "docker.sock")
	metad := testdocker.Build(t, "metad/cmd/metad")
	docker := dockerAt(t, h, socket)
	variable := func(want string, args ...string) {
		t.Helper()
		args = append(append([]string{"run", "--rm", "--name", "switch", "--network",
			"none"}, args...), testdocker.BusyboxImage, "sh", "-c", "echo $ECS_CONTAINER_METADATA_FILE")
		if got := docker(args...); got != want {
			t.Errorf("docker %q: got %q, want %q", args, got, want)
		}
	}
	const on, off, file = "metad.container-metadata=true", "metad.container-metadata=false",
		"/ecs/metadata/switch/metadata.json"

	d := startMetad(t, h, "--docker-proxy", socket)
	variable("")
	variable(file, "--label", on)
	kept := docker("run", "-d", "--name", "before", "--label", on, "--network", "none",
		testdocker.BusyboxImage)
	t.Cleanup(func() { h.Remove(t, kept) })
	d.stop()
	h.CLI(t, "rename", "before", "after")

	t.Setenv("ECS_ENABLE_CONTAINER_METADATA", "true")
	d.start("--docker-proxy", socket)
	d.waitReady()
	variable(file)
	variable("", "--label", off)
	variable("", "-v", t.TempDir()+":/ecs")
	waitFor(t, "the new name in the file", func() bool {
		return strings.Contains(h.Exec(t, kept, "sh", "-c",
			"cat $ECS_CONTAINER_METADATA_FILE"), `"DockerContainerName": "/after"`)
	})
	out := docker("run", "--rm", "-v", metad+":/metad:ro", "--network", h.ECSNetwork(t),
		"--entrypoint", "sh", testdocker.BusyboxImage, "-c",
		`/metad wait-file --timeout 10s && exec "$@"`, "--", "sh", "-c",
		"cat $ECS_CONTAINER_METADATA_FILE")
	if !strings.Contains(out, `"MetadataFileStatus": "READY"`) {
		t.Errorf("after wait-file: got %s", out)
	}
}

// One metad takes over from the other while the docker command creates containers and others ask
// the Engine: nobody fails, and every container gets its file.
func TestRootProxyTakeover(t *testing.T) {
	const takeovers = 4
	h := testdocker.Shared(t)
	socket := filepath.Join(t.TempDir(), "docker.sock")
	args := []string{"--docker-proxy", socket, "--container-metadata"}
	d := startMetad(t, h, args...)
	var ids []string
	var pings atomic.Int64
	end := make(chan struct{})
	var clients sync.WaitGroup
	loop := func(f func() error) {
		clients.Go(func() {
			for {
				select {
				case <-end:
					return
				default:
				}
				if err := f(); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	t.Cleanup(func() {
		clients.Wait()
		for _, id := range ids {
			h.Remove(t, id)
		}
	})
	loop(func() error {
		cmd := h.CLICommand("create", "--network", "none", testdocker.BusyboxImage)
		cmd.Env = append(cmd.Env, "DOCKER_HOST=unix://"+socket)
		out, err := cmd.CombinedOutput()
		if err != nil {
			return fmt.Errorf("docker create after %d: %w: %s", len(ids), err, out)
		}
		ids = append(ids, strings.TrimSpace(string(out)))
		return nil
	})
	for range 2 {
		loop(func() error {
			engine, err := client.NewClientWithOpts(client.WithHost("unix://"+socket),
				client.WithVersion("1.41"))
			if err != nil {
				return err
			}
			defer engine.Close()
			if _, err := engine.Ping(t.Context()); err != nil {
				return fmt.Errorf("ping after %d: %w", pings.Load(), err)
			}
			pings.Add(1)
			_, err = engine.ContainerCreate(t.Context(),
				&container.Config{Image: "not-there"}, nil, nil, nil, "")
			if !errdefs.IsNotFound(err) {
				return fmt.Errorf("create on the same connection: %w", err)
			}
			return nil
		})
	}
	for range takeovers {
		old := d.done
		d.start(args...)
		<-old
		d.waitReady()
	}
	close(end)
	clients.Wait()
	t.Logf("during %d takeovers: %d containers created, %d pings", takeovers, len(ids),
		pings.Load())
	for _, id := range ids {
		var doc mdfile.Document
		for _, m := range h.Inspect(t, id).Mounts {
			if err := json.Unmarshal(
				[]byte(readFile(filepath.Join(m.Source, mdfile.FileName))),
				&doc); err != nil {
				t.Errorf("container %.12s: %v", id, err)
			}
		}
		if doc.ContainerID != id {
			t.Errorf("container %.12s: got a file of container %q", id, doc.ContainerID)
		}
	}
}
