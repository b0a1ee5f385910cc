package introspection

import (
	"context"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	"metad/pkg/task"
)

func tasks() []*task.Task {
	web := &task.Container{ID: strings.Repeat("ab", 32), Name: "web", DockerName: "shop-web-1",
		Image: "nginx", ImageID: "sha256:aa",
		Type: task.TypeNormal, CreatedAt: time.Date(2024, 1, 2, 3, 4, 5, 0, time.UTC),
		DockerNetworks: []task.DockerNetwork{{Name: "shop", IPAddress: "172.18.0.2"}},
		Ports:          []task.Port{{ContainerPort: 80, Protocol: "tcp", HostPort: 8080}}}
	pause := &task.Container{ID: strings.Repeat("ef", 32), Name: task.PauseName,
		Type: task.TypeCNIPause}
	other := &task.Container{ID: strings.Repeat("ab", 31) + "00", Name: "other",
		Type: task.TypeNormal}
	return []*task.Task{
		{ARN: "arn:one", Family: "shop", Revision: "7", DesiredStatus: task.StatusRunning, KnownStatus: task.StatusRunning, Containers: []*task.Container{web, pause}},
		{ARN: "arn:two", KnownStatus: task.StatusCreated, Containers: []*task.Container{other}},
	}
}

// started is a server on a free port.
func started(t *testing.T) (*Server, func(path string) (int, string)) {
	t.Helper()
	s, err := Listen(Config{Addr: "127.0.0.1:0", Cluster: "demo", Version: "1", Tasks: tasks})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() { served <- s.Serve(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-served; err != nil {
			t.Error(err)
		}
	})
	return s, func(path string) (int, string) {
		t.Helper()
		resp, err := http.Get("http://" + s.Addr().String() + path)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		b, err := io.ReadAll(resp.Body)
		if err != nil {
			t.Fatal(err)
		}
		return resp.StatusCode, string(b)
	}
}

const (
	one = `{"Arn":"arn:one","DesiredStatus":"RUNNING","KnownStatus":"RUNNING","Family":"shop","Version":"7","Containers":[{"DockerId":"abababababababababababababababababababababababababababababababab","DockerName":"shop-web-1","Name":"web","Image":"nginx","ImageID":"sha256:aa","CreatedAt":"2024-01-02T03:04:05Z","Ports":[{"ContainerPort":80,"Protocol":"tcp","HostPort":8080}],"Networks":[{"NetworkMode":"shop","IPv4Addresses":["172.18.0.2"]}]}]}`
	two = `{"Arn":"arn:two","DesiredStatus":"PENDING","KnownStatus":"PENDING","Family":"","Version":"","Containers":[{"DockerId":"abababababababababababababababababababababababababababababababab00","DockerName":"","Name":"other","Image":"","ImageID":""}]}`
	no  = `{"Arn":"","KnownStatus":"","Family":"","Version":"","Containers":null}`
)

// The API's paths and queries are answered as by the agent; pause containers are not shown.
func TestAPI(t *testing.T) {
	_, get := started(t)
	f := func(path string, status int, body string) {
		t.Helper()
		if gotStatus, got := get(path); gotStatus != status || got != body {
			t.Errorf("%s: got %d %s, want %d %s", path, gotStatus, got, status, body)
		}
	}
	id, commands := strings.Repeat("ab", 32),
		`{"AvailableCommands":["/v1/metadata","/v1/tasks"]}`
	f("/v1/metadata", 200, `{"Cluster":"demo","ContainerInstanceArn":null,"Version":"metad - 1"}`)
	f("/v1/tasks", 200, `{"Tasks":[`+one+","+strings.Replace(two, "ab00", "00", 1)+`]}`)
	f("/v1/tasks?taskarn=arn:one", 200, one)
	f("/v1/tasks?dockerid="+id, 200, one)
	f("/v1/tasks?dockerid="+strings.Repeat("ef", 6), 200, one) // its pause container
	f("/v1/tasks?dockerid="+id[:12], 400, no)                  // two begin so
	f("/v1/tasks?dockerid="+id[:13], 404, no)                  // too long to be a beginning
	f("/v1/tasks?taskarn=arn:three", 404, no)
	f("/v1/tasks?taskarn=arn:one&dockerid="+id, 400, no)
	f("/", 200, commands)
	f("/v2/tasks", 200, commands)
}

// Listen fails at an address that is in use, for example by an agent.
func TestAddressTaken(t *testing.T) {
	s, _ := started(t)
	if _, err := Listen(Config{Addr: s.Addr().String(), Tasks: tasks}); err == nil ||
		!strings.Contains(err.Error(), "in use") {
		t.Errorf("got %v", err)
	}
}
