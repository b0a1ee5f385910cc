package task

import (
	"bytes"
	"encoding/json"
	"maps"
	"math"
	"path/filepath"
	"runtime"
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
	eni := Network{"awsvpc", []string{"192.0.2.3"}, []string{"2001:db8::3"}, NetworkDetails{
		MAC: "02:00:00:00:00:01", Subnet: "192.0.2.0/24", IPv6Subnet: "2001:db8::/64",
		SubnetGateway: "192.0.2.1/24", IPv6SubnetGateway: "2001:db8::1/64",
		DNSServers: []string{"192.0.2.2"}, DNSSearch: []string{"ec2.internal"},
		DNSName: "ip-192-0-2-3.ec2.internal"}}
	app := &Container{
		ID: strings.Repeat("ab", 32), Name: "app",
		DockerName: "ecs-web-7-app-aabbccddeeff00112233",
		Image:      "nginx:1", ImageID: "sha256:aa",
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
		Networks:  []Network{eni},
		Health: &Health{"HEALTHY", time.Date(2024, 1, 2, 3, 5, 0, 120_000_000, time.UTC),
			0, "hello\n"},
		Volumes: []Volume{{"shared-local", "/var/lib/docker/volumes/shared-local/_data",
			"/ecs"}, {"", "/etc", "/host"}},

		PID: 4711, State: "running", NetworkMode: "container:x", EndpointID: "e",
		LogDriver: "awslogs", LogOptions: map[string]string{"awslogs-stream": "s",
			"awslogs-group": "<g>"},
		RestartPolicy: true, RestartCount: 0,
		DockerNetworks: []DockerNetwork{{Name: "bridge"}}, Stats: &StatsCell{},
	}
	stopped := &Container{
		ID: strings.Repeat("cd", 32), Name: "init", DockerName: "ecs-web-7-init-00",
		Image: "busybox", ImageID: "sha256:bb",
		DesiredStatus: StatusStopped, KnownStatus: StatusStopped, ExitCode: ptr(0),
		CreatedAt: app.CreatedAt, StartedAt: app.StartedAt,
		FinishedAt: app.StartedAt.Add(time.Second),
		Type:       TypeNormal, Networks: app.Networks[:1], Health: &Health{},
		Stats: &StatsCell{},
	}
	pause := &Container{
		ID: strings.Repeat("ef", 32), Name: PauseName,
		DockerName:    "ecs-web-7-internalecspause-00",
		Image:         "amazon/amazon-ecs-pause:0.1.0",
		DesiredStatus: StatusResourcesProvisioned, KnownStatus: StatusResourcesProvisioned,
		Type:     TypeCNIPause,
		Networks: []Network{{Mode: "awsvpc", IPv4Addresses: []string{"192.0.2.3"}}},
		Stats:    &StatsCell{},
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
		LaunchType: "EC2", ServiceName: "shop", VPCID: "vpc-1",
		AvailabilityZoneID: "usw2-az1", FaultInjectionEnabled: true,
	}
}

// bridge is a task of containers on Docker's networks: on two, on the first one's, on the host's,
// stopped and about to be created.
func bridge() *Task {
	web := &Container{
		ID: strings.Repeat("12", 32), Name: "web", DockerName: "shop-web-1", Image: "web",
		ImageID: "sha256:cc",
		Ports: []Port{{80, "tcp", 8080, "0.0.0.0"}, {80, "tcp", 8080, "::"},
			{53, "udp", 0, ""}},
		DesiredStatus: StatusRunning, KnownStatus: StatusRunning, Type: TypeNormal,
		NetworkMode: "shop_back",
		LogDriver:   "json-file", RestartPolicy: true, RestartCount: 3,
		DockerNetworks: []DockerNetwork{
			{"shop_back", "172.18.0.2", "fd00::2", "172.18.0.1", "fd00::1",
				NetworkDetails{MAC: "02:42:ac:12:00:02",
					Subnet: "172.18.0.0/16", IPv6Subnet: "fd00::/64",
					SubnetGateway:     "172.18.0.1/16",
					IPv6SubnetGateway: "fd00::1/64",
					DNSName:           "shop-web-1"}},
			{Name: "shop_front", IPAddress: "172.19.0.2"},
		},
	}
	joined := &Container{ID: strings.Repeat("34", 32), Name: "joined",
		NetworkMode: "container:" + web.ID, Type: TypeNormal}
	host := &Container{ID: strings.Repeat("56", 32), Name: "host", NetworkMode: "host",
		Type:           TypeNormal,
		DockerNetworks: []DockerNetwork{{Name: "host"}}}
	apart := &Container{ID: strings.Repeat("78", 32), Name: "apart",
		NetworkMode: "container:another", Type: TypeNormal}
	creating := &Container{Name: "creating", NetworkMode: "bridge", Type: TypeNormal}
	return &Task{ARN: "arn:aws:ecs:us-west-2:111122223333:task/default/shop",
		Cluster: "default", Family: "shop", Revision: "1",
		LaunchType: "EXTERNAL", Containers: []*Container{web, joined, host, apart,
			creating}}
}

// The documents are these, byte for byte.
func TestRenderGolden(t *testing.T) {
	for name, tk := range map[string]*Task{
		"task-full":   full(),
		"task-bridge": bridge(),
		"task-bare":   {ARN: "arn", Cluster: "c", KnownStatus: StatusNone},
		"container-creating": {Containers: []*Container{{Name: "app",
			DockerName: "ecs-web-7-app-00", Image: "nginx:1",
			DesiredStatus: StatusRunning, KnownStatus: StatusNone, Type: TypeNormal}}},
		"container-bridge": {Containers: []*Container{{ID: "x", Ports: []Port{{80, "tcp", 8080, "0.0.0.0"}, {53, "udp", 0, ""}}}}},
	} {
		whole, each := Render(tk)
		for v, version := range []string{"", "-v3", "-v4"} {
			if strings.HasPrefix(name, "task") {
				golden(t, name+version, whole[v].AppendTo(nil))
			} else {
				golden(t, name+version, each[0][v].AppendTo(nil))
			}
		}
	}
	_, each := Render(full())
	for i, name := range []string{"container-full", "container-stopped", "container-pause"} {
		golden(t, name, each[i][V2].AppendTo(nil))
	}
}

// A container's document is its element of its task's document, in each version; each document says
// how long it is, and an appended one leaves what is before it.
func TestContainerDocumentIsElement(t *testing.T) {
	for _, tk := range []*Task{full(), bridge()} {
		whole, each := Render(tk)
		for v := range whole {
			text := whole[v].AppendTo([]byte("before"))
			var doc struct{ Containers []json.RawMessage }
			if err := json.Unmarshal(bytes.TrimPrefix(text, []byte("before")),
				&doc); err != nil {
				t.Fatalf("version %d: %v in %s", v, err, text)
			}
			if whole[v].Len() != len(text)-len("before") ||
				len(doc.Containers) != len(tk.Containers) {
				t.Errorf("version %d: length %d, %d containers of %s", v,
					whole[v].Len(), len(doc.Containers), text)
			}
			for i := range doc.Containers {
				if got := each[i][v].String(); got != string(doc.Containers[i]) ||
					each[i][v].Len() != len(got) {
					t.Errorf("version %d, container %d: got %s, want %s", v, i,
						got, doc.Containers[i])
				}
			}
		}
	}
}

// M16: a container that is only pulled is in v4's task document alone.
func TestPulledContainer(t *testing.T) {
	pulled := &Container{Name: "pulled", KnownStatus: StatusPulled}
	f := func(list []*Container, want [versions]int) {
		t.Helper()
		whole, _ := Render(&Task{Containers: list})
		for v := range whole {
			var doc struct{ Containers []struct{ Name string } }
			if err := json.Unmarshal(whole[v].AppendTo(nil), &doc); err != nil ||
				len(doc.Containers) != want[v] {
				t.Errorf("version %d: got %v of %s, want %d containers", v, err,
					whole[v], want[v])
			}
		}
	}
	f([]*Container{pulled}, [...]int{0, 0, 1})
	f([]*Container{pulled, {ID: "x"}, pulled, {ID: "y"}}, [...]int{2, 2, 4})
}

// ContainerARN is ECS's own where it is known, else made of the task's ARN.
func TestContainerARN(t *testing.T) {
	f := func(taskARN, cluster string, c Container, want string) {
		t.Helper()
		if got := containerARN(&Task{ARN: taskARN, Cluster: cluster}, &c); got != want {
			t.Errorf("got %q, want %q", got, want)
		}
	}
	f("arn:aws:ecs:r:1:task/c/t", "", Container{ID: "x"}, "arn:aws:ecs:r:1:container/c/t/x")
	f("arn:aws:ecs:r:1:task/t", "arn:aws:ecs:r:1:cluster/c", Container{ID: "x"}, "arn:aws:ecs:r:1:container/c/t/x")
	f("arn:aws:ecs:r:1:task/c/t", "", Container{ID: "x", ARN: "arn:own"}, "arn:own")
	f("arn:aws:ecs:r:1:task/c/t", "", Container{}, "")
	f("arn", "", Container{ID: "x"}, "")
}

// The documents of three versions take at most two thirds of the memory that copies of each would
// take.
func TestDocumentMemory(t *testing.T) {
	const tasks = 300
	heap := func() uint64 {
		runtime.GC()
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return m.HeapAlloc
	}
	// held returns what a container takes of what render returns, in bytes.
	held := func(tk *Task, render func() any) float64 {
		keep := make([]any, tasks)
		before := heap()
		for i := range keep {
			keep[i] = render()
		}
		n := heap() - before
		runtime.KeepAlive(keep)
		return float64(n) / tasks / float64(len(tk.Containers))
	}
	copies := func(tk *Task, vs ...Version) func() any {
		return func() any {
			var all [][]byte
			whole, each := Render(tk)
			for _, v := range vs {
				all = append(all, whole[v].AppendTo(nil))
				for _, d := range each {
					all = append(all, d[v].AppendTo(nil))
				}
			}
			return all
		}
	}
	one := bridge()
	one.Containers = one.Containers[:1]
	for name, tk := range map[string]*Task{"awsvpc": full(), "bridge": bridge(),
		"one container": one} {
		shared := held(tk, func() any {
			whole, each := Render(tk)
			return []any{whole, each}
		})
		v2, all := held(tk, copies(tk, V2)), held(tk, copies(tk, V2, V3, V4))
		t.Logf("%s: %.0f bytes a container, %.2f of copies of v2's documents, %.2f of "+
			"copies of all", name, shared, shared/v2, shared/all)
		if shared > all*2/3 {
			t.Errorf("%s: got %.0f bytes a container, want at most two thirds of %.0f",
				name, shared, all)
		}
	}
}

// FuzzAppendTask: whatever Docker says, every document is JSON that says it back; v3 adds networks
// to v2 and nothing else, v4 has all that v2 has.
func FuzzAppendTask(f *testing.F) {
	f.Add("arn:aws:ecs:us-west-2:111122223333:task/default/158d", "app", "k", "<v>", int64(10),
		0.25, int64(1704164645), "RUNNING")
	f.Add("\x00", "\xff\xfe", "\u2028", "\"\\", int64(-1), math.Inf(-1), int64(math.MaxInt64),
		"")
	f.Fuzz(func(t *testing.T, arn, name, key, value string, units int64, vcpu float64,
		unix int64, status string) {
		c := &Container{ID: name, Name: name, Labels: map[string]string{key: value},
			Limits:    ContainerLimits{units, units},
			CreatedAt: time.Unix(unix, units), KnownStatus: Status(status),
			Volumes: []Volume{{value, key, name}},
			Ports:   []Port{{uint16(units), key, uint16(unix), value}}, LogDriver: key,
			LogOptions:  map[string]string{key: value},
			NetworkMode: value, RestartPolicy: units > 0, RestartCount: int(units)}
		if unix%2 == 0 {
			c.DockerNetworks = []DockerNetwork{{key, value, name, key, key,
				NetworkDetails{DNSName: value, DNSSearch: []string{name}}}}
		}
		in := &Task{ARN: arn, Family: value, Limits: TaskLimits{vcpu, units},
			Containers:    []*Container{c, {ID: "other"}},
			PullStartedAt: time.Unix(unix, 0), KnownStatus: Status(status),
			LaunchType: key, ServiceName: value}
		whole, each := Render(in)
		for v, doc := range whole {
			checkFuzzed(t, in, doc.AppendTo(nil), each[0][v].AppendTo(nil), c.ID == "" && c.KnownStatus == StatusPulled && Version(v) != V4)
		}
		tops := [versions]map[string]json.RawMessage{fields(t, whole[V2]),
			fields(t, whole[V3]), fields(t, whole[V4])}
		parts := [versions]map[string]json.RawMessage{fields(t, each[0][V2]),
			fields(t, each[0][V3]), fields(t, each[0][V4])}
		delete(parts[V3], "Networks")
		if !maps.EqualFunc(parts[V2], parts[V3], func(a, b json.RawMessage) bool {
			return bytes.Equal(a, b)
		}) {
			t.Errorf("v2 %s, v3 %s", parts[V2], parts[V3])
		}
		contains(t, tops[V4], tops[V2], "Containers")
		contains(t, parts[V4], parts[V2], "Ports")
		if _, ok := tops[V4]["FaultInjectionEnabled"]; !ok {
			t.Errorf("no FaultInjectionEnabled in %s", whole[V4])
		}
	})
}

func fields(t *testing.T, d Document) (m map[string]json.RawMessage) {
	t.Helper()
	if err := json.Unmarshal(d.AppendTo(nil), &m); err != nil {
		t.Fatalf("%v in %s", err, d)
	}
	return m
}

// contains fails unless more has all members of less, except may as it is there.
func contains(t *testing.T, more, less map[string]json.RawMessage, except string) {
	t.Helper()
	for name, want := range less {
		if got, ok := more[name]; !ok || name != except && !bytes.Equal(got, want) {
			t.Errorf("%s: got %s, want %s", name, got, want)
		}
	}
}

// checkFuzzed checks the document of in, and that of its first container, which the former does not
// list if hidden.
func checkFuzzed(t *testing.T, in *Task, doc, first []byte, hidden bool) {
	t.Helper()
	var out struct {
		TaskARN    string
		Containers []struct {
			DockerId, Name string
			Labels         map[string]string
			Limits         struct{ CPU, Memory *int64 }
		}
	}
	if err := json.Unmarshal(doc, &out); err != nil {
		t.Fatalf("%v in %s", err, doc)
	}
	utf8 := func(s string) string { return strings.ToValidUTF8(s, "") }
	same := func(got, want string) bool {
		return utf8(strings.ReplaceAll(got, "\ufffd", "")) == strings.ReplaceAll(utf8(want),
			"\ufffd", "")
	}
	if !same(out.TaskARN, in.ARN) {
		t.Errorf("TaskARN: got %q, want %q", out.TaskARN, in.ARN)
	}
	if bytes.ContainsAny(doc, "<>&\n") {
		t.Errorf("not escaped: %s", doc)
	}
	if hidden {
		if len(out.Containers) != 1 {
			t.Errorf("got %s, want one container", doc)
		}
		return
	}
	c, got := in.Containers[0], out.Containers[0]
	if len(out.Containers) != 2 || !same(got.Name, c.Name) || got.Limits.CPU == nil ||
		*got.Limits.CPU != max(2, c.Limits.CPU) ||
		got.Limits.Memory == nil || *got.Limits.Memory != c.Limits.Memory ||
		len(got.Labels) != 1 {
		t.Errorf("got %+v from %s", got, doc)
	}
	if !bytes.Contains(doc, first) {
		t.Errorf("%s is no part of %s", first, doc)
	}
}
