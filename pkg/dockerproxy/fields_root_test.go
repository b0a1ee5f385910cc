//go:build root

package dockerproxy

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"
)

// A container that is created through the proxy is the container that it would be without it, field
// by field, but for metad's own variables and mount: also with what newer API versions can say
// (1.43 annotations, 1.44 a MAC for each network and a health check's start interval, 1.45 a part
// of a volume). An Engine or a client that does not know it refuses it in the same words.
func TestRootCreateFields(t *testing.T) {
	g := newRootGround(t, options{uris: true})
	straight := &session{g, t, g.Socket, t.TempDir()}
	through := &session{g, t, g.socket, t.TempDir()}
	for i, name := range []string{"fields-a", "fields-b"} {
		straight.must("network", "create", "--subnet", fmt.Sprintf("10.88.%d.0/24", i),
			name)
		defer straight.must("network", "rm", name)
	}
	straight.must("volume", "create", "fields")
	defer straight.must("volume", "rm", "fields")
	for _, args := range []string{
		"--platform linux/amd64",
		"--platform linux/arm64 --pull never",
		"--mac-address 02:42:0a:58:00:07 --network fields-a",
		"--network name=fields-a,alias=web,ip=10.88.0.9",
		"--network name=fields-a,mac-address=02:42:0a:58:00:09 --network name=fields-b,ip=10.88.1.9",
		"--network name=fields-a,driver-opt=com.docker.network.endpoint.ifname=up0",
		"--network name=fields-a,gw-priority=1 --network fields-b",
		"--annotation a=b --label c=d -e E=f",
		"--health-cmd true --health-interval 5s --health-start-interval 1s",
		"--mount type=volume,src=fields,dst=/v,volume-nocopy",
		"--mount type=volume,src=fields,dst=/v,volume-subpath=below",
		"--mount type=bind,src=/tmp,dst=/b,bind-recursive=disabled,readonly",
		"--mount type=image,src=" + image + ",dst=/i",
		"--tmpfs /t:size=1m --shm-size 1m --init --ulimit nofile=100:200 --sysctl net.ipv4.ip_forward=0",
		"-v /v -v fields:/w:ro --volume-driver local --read-only --security-opt no-new-privileges",
		"--cpus 0.5 --memory 64m --pids-limit 10 --restart on-failure:3 --stop-timeout 3 --gpus all",
		"--device-cgroup-rule a_1:1_r --group-add 7 --add-host h:10.0.0.1 --dns 10.0.0.2 -p 80/udp",
	} {
		t.Run(args, func(t *testing.T) {
			words := strings.Fields(args)
			for i, w := range words {
				words[i] = strings.ReplaceAll(w, "_", " ")
			}
			want := createdFields(t, straight, words)
			got := createdFields(t, through, words)
			if got != want {
				t.Errorf("through the proxy:\n%s\nwithout it:\n%s", got, want)
			}
			if !strings.HasPrefix(want, "{") {
				t.Logf("refused: %.300s", want)
			}
		})
	}
	if n := g.warnings(); n != 0 {
		t.Errorf("got %d warnings: %v", n, g.logs.All())
	}
}

// createdFields creates a container and returns all that the Engine was told of it, without ids and
// without metad's additions, or what the user sees if it is refused.
func createdFields(t *testing.T, s *session, args []string) string {
	t.Helper()
	s.t = t
	r := s.docker(append(append([]string{"create"}, args...), image, "sleep", "1")...)
	if r.code != 0 {
		return noID(r.String())
	}
	id := strings.TrimSpace(r.stdout)
	defer s.must("rm", "-v", id)
	var c []struct {
		Platform        string
		Config          map[string]any
		HostConfig      map[string]any
		NetworkSettings struct{ Networks map[string]any }
	}
	if err := json.Unmarshal([]byte(s.must("inspect", id)), &c); err != nil || len(c) != 1 {
		t.Fatalf("inspect: %v", err)
	}
	without(c[0].Config, "Env", func(v string) bool {
		return strings.HasPrefix(v, "ECS_CONTAINER_METADATA_")
	})
	without(c[0].HostConfig, "Binds", func(v string) bool { return strings.HasPrefix(v, s.dataDir) })
	text, err := json.MarshalIndent(c[0], "", " ")
	if err != nil {
		t.Fatal(err)
	}
	return noID(string(text))
}

// without removes the strings that f reports from the list at key. What is empty then is null, as
// where there was none.
func without(fields map[string]any, key string, f func(string) bool) {
	list, _ := fields[key].([]any)
	var kept []any
	for _, v := range list {
		if text, ok := v.(string); !ok || !f(text) {
			kept = append(kept, v)
		}
	}
	fields[key] = kept
}
