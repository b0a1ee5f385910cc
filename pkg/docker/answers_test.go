package docker

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/docker/docker/api/types/container"
	"github.com/docker/docker/api/types/network"
	"github.com/docker/docker/client"
)

// answering returns our client and Docker's own, of an Engine that gives the same answer to each
// request but the negotiation of the version.
func answering(t *testing.T, status int, body string) (ours *Client, own *client.Client) {
	t.Helper()
	socket := filepath.Join(t.TempDir(), "docker.sock")
	ln, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	s := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if strings.HasSuffix(r.URL.Path, "/_ping") {
			w.Header().Set("Api-Version", "1.41")
			return
		}
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(status)
		_, _ = io.WriteString(w, body)
	})}
	go s.Serve(ln) //nolint:errcheck // ends with the test
	t.Cleanup(func() { s.Close() })
	if ours, err = NewClient("unix://" + socket); err != nil {
		t.Fatal(err)
	}
	own, err = client.NewClientWithOpts(client.WithHost("unix://"+socket),
		client.WithAPIVersionNegotiation())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ours.Close(); own.Close() })
	return ours, own
}

// What metad knows of a container is the same as if Docker's client had decoded the whole answer.
func TestAnswersInspect(t *testing.T) {
	full := recorded(t, "running")
	full.Config.Env = append(full.Config.Env, "ECS_CONTAINER_METADATA_URI=http://x/v3/some-id",
		"ECS_CONTAINER_METADATA_FILE=/x")
	full.Config.Hostname, full.Config.Domainname = "a", "b.example"
	full.HostConfig.DNS, full.HostConfig.DNSSearch = []string{"10.0.0.2"}, []string{"c.example"}
	full.HostConfig.Resources = container.Resources{CPUShares: 512, Memory: 1 << 30,
		NanoCPUs: 5e8, CgroupParent: "/ecs/x", CPUPeriod: 50000, CPUQuota: 25000}
	full.HostConfig.RestartPolicy.Name = "always"
	full.HostConfig.LogConfig.Config = map[string]string{"max-file": "3"}
	full.RestartCount = 3
	full.Mounts = []container.MountPoint{{Name: "n", Source: "/s", Destination: "/d"}}
	full.NetworkSettings.Networks["other"] = &network.EndpointSettings{
		MacAddress: "02:42:ac:11:00:02", Gateway: "172.18.0.1", IPAddress: "172.18.0.2",
		IPPrefixLen: 16, IPv6Gateway: "fd00::1", GlobalIPv6Address: "fd00::2",
		GlobalIPv6PrefixLen: 64}
	full.NetworkSettings.Networks["none yet"] = nil
	full.State.Health = &container.Health{Status: "healthy"}
	full.State.Health.Log = []*container.HealthcheckResult{
		{Start: time.Unix(1, 0), End: time.Unix(2, 0), Output: "ok"}}
	b, err := json.Marshal(full)
	if err != nil {
		t.Fatal(err)
	}
	bodies := map[string]string{"full": string(b)}
	for _, name := range []string{"running", "exited", "created", "pause", "app"} {
		b, err := os.ReadFile("testdata/" + name + ".json")
		if err != nil {
			t.Fatal(err)
		}
		bodies[name] = string(b)
	}
	for name, body := range bodies {
		ours, own := answering(t, http.StatusOK, body)
		got, err1 := ours.ContainerInspect(context.Background(), "x")
		want, err2 := own.ContainerInspect(context.Background(), "x")
		if err1 != nil || err2 != nil {
			t.Fatal(err1, err2)
		}
		if g, w := described(t, &got), described(t, &want); !reflect.DeepEqual(g, w) {
			t.Errorf("%s: got %+v, want %+v", name, g, w)
		}
	}
}

// What is used of a list is the same as if Docker's client had decoded all of it.
func TestAnswersList(t *testing.T) {
	ours, own := answering(t, http.StatusOK, `[{"Id":"a","Names":["/n","/m"],"State":"running",
		"Status":"Up 2 hours (healthy)","Labels":{"k":"v"},"Mounts":[{"Source":"/s","RW":true}],
		"NetworkSettings":{"Networks":{"ecs":{"IPAddress":"10.0.0.2","Gateway":"10.0.0.1"},
		"none":null}}}, {"Id":"b","NetworkSettings":null}]`)
	got, err1 := ours.ContainerList(context.Background(), container.ListOptions{})
	want, err2 := own.ContainerList(context.Background(), container.ListOptions{})
	if err1 != nil || err2 != nil {
		t.Fatal(err1, err2)
	}
	want[0].Labels, want[0].Mounts[0].RW = nil, false
	want[0].NetworkSettings.Networks["ecs"].Gateway = ""
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got %s, want %s", show(got), show(want))
	}
	for _, none := range []string{"[]", "null", "[] "} {
		ours, _ := answering(t, http.StatusOK, none)
		if list, err := ours.ContainerList(context.Background(),
			container.ListOptions{}); err != nil || len(list) != 0 {
			t.Errorf("%s: got %v, %v", none, list, err)
		}
	}
}

// An answer that is cut off or of another form is an error and no container, and an error of the
// Engine stays what it is.
func TestAnswersWrong(t *testing.T) {
	whole, err := os.ReadFile("testdata/running.json")
	if err != nil {
		t.Fatal(err)
	}
	for _, body := range []string{"", "[", `[{"Id":"a"}`, `[{"Id":"a"},`, `{"message":"no"}`, "7",
		`[{"Id":"a"} x`} {
		ours, _ := answering(t, http.StatusOK, body)
		list, err := ours.ContainerList(context.Background(), container.ListOptions{})
		if err == nil {
			t.Errorf("list %q: got %v and no error", body, list)
		}
	}
	for _, body := range []string{"", string(whole[:len(whole)/2]), `{"Config":{"Env":7}}x`, "[]"} {
		ours, _ := answering(t, http.StatusOK, body)
		if _, err := ours.ContainerInspect(context.Background(), "x"); err == nil {
			t.Errorf("inspect %.20q: no error", body)
		}
	}
	ours, _ := answering(t, http.StatusNotFound, `{"message":"No such container: x"}`)
	_, err = ours.ContainerInspect(context.Background(), "x")
	if !errdefs.IsNotFound(err) || fmt.Sprint(err) != "Error response from daemon: "+
		"No such container: x" {
		t.Errorf("got %v, want what the Engine says", err)
	}
}
