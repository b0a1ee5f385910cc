package task

import (
	"bytes"
	"encoding/json"
	"math"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"metad/internal/expect"
)

func golden(t *testing.T, name string, got []byte) {
	t.Helper()
	expect.Golden(t, filepath.Join("testdata", name+".golden.json"), append(got, '\n'))
}

func ptr[T any](v T) *T { return &v }

// full is a task that has everything a document can show.
func full() *Task {
	zone := time.FixedZone("", 2*3600)
	app := &Container{
		ID: strings.Repeat("ab", 32), Name: "app", DockerName: "ecs-web-7-app-aabbccddeeff00112233",
		Image: "nginx:1", ImageID: "sha256:aa",
		Ports: []Port{{80, "tcp", 8080, "0.0.0.0"}, {53, "udp", 0, ""}},
		Labels: map[string]string{
			LabelTaskARN: "arn:aws:ecs:us-west-2:111122223333:task/default/158d", LabelCluster: "default",
			LabelContainerName: "app", LabelFamily: "web", LabelRevision: "7", "html": "<a href=\"x\">&</a>\u2028\x00\xff",
		},
		DesiredStatus: StatusRunning, KnownStatus: StatusRunning,
		Limits:    ContainerLimits{CPU: 10, Memory: 50},
		CreatedAt: time.Date(2024, 1, 2, 3, 4, 5, 500_000_000, time.UTC),
		StartedAt: time.Date(2024, 1, 2, 5, 4, 6, 0, zone),
		Type:      TypeNormal,
		Networks:  []Network{{"awsvpc", []string{"192.0.2.3"}, []string{"2001:db8::3"}}},
		Health:    &Health{"HEALTHY", time.Date(2024, 1, 2, 3, 5, 0, 120_000_000, time.UTC), 0, "hello\n"},
		Volumes:   []Volume{{"shared-local", "/var/lib/docker/volumes/shared-local/_data", "/ecs"}, {"", "/etc", "/host"}},

		PID: 4711, State: "running", NetworkMode: "container:x", RestartCount: 3, EndpointID: "e",
		DockerNetworks: []DockerNetwork{{Name: "bridge"}}, Stats: &StatsCell{},
	}
	stopped := &Container{
		ID: strings.Repeat("cd", 32), Name: "init", DockerName: "ecs-web-7-init-00", Image: "busybox", ImageID: "sha256:bb",
		DesiredStatus: StatusStopped, KnownStatus: StatusStopped, ExitCode: ptr(0),
		CreatedAt: app.CreatedAt, StartedAt: app.StartedAt, FinishedAt: app.StartedAt.Add(time.Second),
		Type: TypeNormal, Networks: app.Networks[:1], Health: &Health{}, Stats: &StatsCell{},
	}
	pause := &Container{
		ID: strings.Repeat("ef", 32), Name: PauseName, DockerName: "ecs-web-7-internalecspause-00",
		Image:         "amazon/amazon-ecs-pause:0.1.0",
		DesiredStatus: StatusResourcesProvisioned, KnownStatus: StatusResourcesProvisioned,
		Type:     TypeCNIPause,
		Networks: []Network{{"awsvpc", []string{"192.0.2.3"}, nil}}, Stats: &StatsCell{},
	}
	return &Task{
		ID: "158d", ARN: "arn:aws:ecs:us-west-2:111122223333:task/default/158d",
		Cluster: "default", Family: "web", Revision: "7",
		DesiredStatus: StatusRunning, KnownStatus: StatusRunning,
		Containers:         []*Container{app, stopped, pause},
		Limits:             TaskLimits{CPU: 0.25, Memory: 512},
		PullStartedAt:      time.Date(2024, 1, 2, 4, 4, 5, 123_456_789, zone),
		PullStoppedAt:      time.Date(2024, 1, 2, 2, 4, 6, 0, time.UTC),
		ExecutionStoppedAt: time.Date(2024, 1, 2, 3, 4, 5, 500_000_000, time.UTC),
		AvailabilityZone:   "us-west-2a", ContainerInstanceARN: "arn:ci",
	}
}

func TestAppendTaskGolden(t *testing.T) {
	golden(t, "task-full", AppendTask(nil, full()))
	golden(t, "task-bare", AppendTask(nil, &Task{ARN: "arn", Cluster: "c", KnownStatus: StatusNone}))
}

func TestAppendContainerGolden(t *testing.T) {
	tk := full()
	for i, name := range []string{"container-full", "container-stopped", "container-pause"} {
		golden(t, name, AppendContainer(nil, tk.Containers[i]))
	}
	golden(t, "container-creating", AppendContainer(nil, &Container{Name: "app", DockerName: "ecs-web-7-app-00", Image: "nginx:1",
		DesiredStatus: StatusRunning, KnownStatus: StatusNone, Type: TypeNormal}))
	golden(t, "container-bridge", AppendContainer(nil, &Container{ID: "x", Ports: []Port{{80, "tcp", 8080, "0.0.0.0"}, {53, "udp", 0, ""}}}))
}

// The caller's bytes stay, and a container's document is its element of the task's.
func TestAppendDocumentAppends(t *testing.T) {
	tk := full()
	whole := AppendTask([]byte("before"), tk)
	if !bytes.HasPrefix(whole, []byte(`before{"Cluster":`)) {
		t.Errorf("got %.40s", whole)
	}
	var doc struct{ Containers []json.RawMessage }
	if err := json.Unmarshal(whole[len("before"):], &doc); err != nil {
		t.Fatal(err)
	}
	for i, c := range tk.Containers {
		if got := AppendContainer([]byte("x"), c); string(got) != "x"+string(doc.Containers[i]) {
			t.Errorf("container %d: got %s, want %s", i, got[1:], doc.Containers[i])
		}
	}
}

func TestTaskLimits(t *testing.T) {
	f := func(l TaskLimits, want string) {
		t.Helper()
		got := string(AppendTask(nil, &Task{Limits: l}))
		_, limits, _ := strings.Cut(got, `"Limits":`)
		if limits, _, _ = strings.Cut(limits, "}"); limits != want {
			t.Errorf("%+v: got %q, want %q in %s", l, limits, want, got)
		}
	}
	f(TaskLimits{}, "")
	f(TaskLimits{CPU: 0.25}, `{"CPU":0.25`)
	f(TaskLimits{CPU: 2}, `{"CPU":2`)
	f(TaskLimits{Memory: 512}, `{"Memory":512`)
	f(TaskLimits{CPU: 0.25, Memory: 512}, `{"CPU":0.25,"Memory":512`)
	f(TaskLimits{CPU: math.NaN()}, "")
	f(TaskLimits{CPU: math.Inf(1), Memory: 1}, `{"Memory":1`)
}

func TestShownTime(t *testing.T) {
	f := func(in time.Time, want string) {
		t.Helper()
		got := "absent"
		if p := shownTime(in); p != nil {
			b, err := p.MarshalText()
			if err != nil {
				t.Fatal(err)
			}
			got = string(b)
		}
		if got != want {
			t.Errorf("%v: got %s, want %s", in, got, want)
		}
	}
	f(time.Time{}, "absent")
	f(time.Time{}.In(time.FixedZone("", 3600)), "absent")
	f(time.Date(2024, 1, 2, 3, 4, 6, 0, time.UTC), "2024-01-02T03:04:06Z")
	f(time.Date(2024, 1, 2, 3, 4, 5, 500_000_000, time.UTC), "2024-01-02T03:04:05.5Z")
	f(time.Date(2024, 1, 2, 3, 4, 5, 123_456_789, time.FixedZone("", -3600)), "2024-01-02T04:04:05.123456789Z")
	f(time.Date(9999, 12, 31, 23, 59, 59, 0, time.UTC), "9999-12-31T23:59:59Z")
	f(time.Date(9999, 12, 31, 23, 59, 59, 0, time.FixedZone("", -3600)), "absent")
	f(time.Date(-1, 1, 1, 0, 0, 0, 0, time.UTC), "absent")
}

// FuzzAppendTask: whatever Docker says, the document is JSON that says it back.
func FuzzAppendTask(f *testing.F) {
	f.Add("arn:aws:ecs:us-west-2:111122223333:task/default/158d", "app", "k", "<v>", int64(10), 0.25, int64(1704164645), "RUNNING")
	f.Add("\x00", "\xff\xfe", "\u2028", "\"\\", int64(-1), math.Inf(-1), int64(math.MaxInt64), "")
	f.Fuzz(func(t *testing.T, arn, name, key, value string, units int64, vcpu float64, unix int64, status string) {
		c := &Container{ID: name, Name: name, Labels: map[string]string{key: value}, Limits: ContainerLimits{units, units},
			CreatedAt: time.Unix(unix, units), KnownStatus: Status(status), Volumes: []Volume{{value, key, name}}}
		in := &Task{ARN: arn, Family: value, Limits: TaskLimits{vcpu, units}, Containers: []*Container{c},
			PullStartedAt: time.Unix(unix, 0), KnownStatus: Status(status)}
		var out struct {
			TaskARN    string
			Containers []struct {
				DockerId, Name string
				Labels         map[string]string
				Limits         struct{ CPU, Memory *int64 }
			}
		}
		doc := AppendTask(nil, in)
		if err := json.Unmarshal(doc, &out); err != nil {
			t.Fatalf("%v in %s", err, doc)
		}
		utf8 := func(s string) string { return strings.ToValidUTF8(s, "") }
		same := func(got, want string) bool {
			return utf8(strings.ReplaceAll(got, "\ufffd", "")) == strings.ReplaceAll(utf8(want), "\ufffd", "")
		}
		if !same(out.TaskARN, arn) {
			t.Errorf("TaskARN: got %q, want %q", out.TaskARN, arn)
		}
		if len(out.Containers) == 0 && c.ID == "" && c.KnownStatus == StatusPulled {
			return
		}
		got := out.Containers[0]
		if !same(got.Name, name) || got.Limits.CPU == nil || *got.Limits.CPU != max(2, units) || got.Limits.Memory == nil || len(got.Labels) != 1 {
			t.Errorf("got %+v from %s", got, doc)
		}
		if bytes.ContainsAny(doc, "<>&\n") {
			t.Errorf("not escaped: %s", doc)
		}
	})
}

// Every member of the wire types has a name of the agent's: one added by mistake would show.
func TestDocumentKeys(t *testing.T) {
	f := func(v any, want string) {
		t.Helper()
		var got []string
		for i := range reflect.TypeOf(v).NumField() {
			got = append(got, reflect.TypeOf(v).Field(i).Name)
		}
		if strings.Join(got, " ") != want {
			t.Errorf("%T: got %v, want %s", v, got, want)
		}
	}
	f(taskDocument{}, "Cluster TaskARN Family Revision DesiredStatus KnownStatus Containers Limits PullStartedAt PullStoppedAt ExecutionStoppedAt AvailabilityZone")
	f(containerDocument{}, "DockerId Name DockerName Image ImageID Ports Labels DesiredStatus KnownStatus ExitCode Limits CreatedAt StartedAt FinishedAt Type Networks Health Volumes")
}
