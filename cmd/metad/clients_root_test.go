//go:build root

package main

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"metad/internal/testdocker"
)

const nodeImage = "metad-test-node:latest"

// importNode makes an image with node and OpenTelemetry's detector, which scripts/clients/fetch
// gets.
func importNode(t *testing.T, h *testdocker.Host) {
	t.Helper()
	if os.Getenv("METAD_TEST_BIN") == "" {
		if out, err := exec.Command(
			"../../scripts/clients/fetch").CombinedOutput(); err != nil {
			t.Fatalf("scripts/clients/fetch: %v: %s", err, out)
		}
	}
	h.ImageFromTree(t, nodeImage, "../../.cache/clients/node")
}

// clientHost is a plain Docker host without an ECS agent. run creates a container by the docker
// command through metad's proxy, and returns its id and output: nothing about metad is set by hand.
func clientHost(t *testing.T) (h *testdocker.Host, run func(args ...string) (id, out string)) {
	h = testdocker.Shared(t)
	socket := filepath.Join(t.TempDir(), "docker.sock")
	startMetad(t, h, "--docker-proxy", socket, "--metadata-uris", "--region", "eu-central-1",
		"--account", "111122223333")
	docker := dockerAt(t, h, socket)
	return h, func(args ...string) (id, out string) {
		t.Helper()
		id = docker(append([]string{"run", "-d"}, args...)...)
		t.Cleanup(func() { h.Remove(t, id) })
		code, out := exitOf(t, h, id)
		if code != 0 {
			t.Fatalf("docker run %q: exit code %d: %s", args, code, out)
		}
		return id, strings.TrimSpace(out)
	}
}

// A Go program finds itself and its task by the variables, with a library that knows nothing of
// metad.
func TestRootClientGo(t *testing.T) {
	h, run := clientHost(t)
	importProbe(t, h)
	id, out := run("--name", "go-client", probeImage, "ecsmetadata")
	var got struct {
		V3, V4 struct {
			DockerID   string `json:"DockerId"`
			DockerName string
			Labels     map[string]string
		}
		Task struct {
			Cluster, TaskARN, Family, Revision string
			LaunchType, AvailabilityZone       string
			Containers                         []struct{ DockerId string }
		}
	}
	if err := json.Unmarshal([]byte(out), &got); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if got.V4.DockerID != id || got.V3.DockerID != id || got.V4.DockerName != "go-client" {
		t.Errorf("got containers %+v and %+v, want %s", got.V4, got.V3, id)
	}
	want := "arn:aws:ecs:eu-central-1:111122223333:task/default/" + id[:32]
	if got.Task.TaskARN != want || len(got.Task.Containers) != 1 ||
		got.Task.Containers[0].DockerId != id {
		t.Errorf("got task %+v, want %s", got.Task, want)
	}
	if got.V4.Labels["EcsTaskArn"] != want {
		t.Errorf("got labels %v", got.V4.Labels)
	}
}

// OpenTelemetry's detector takes the container for one of ECS and finds every attribute that it
// looks for.
func TestRootClientOpenTelemetry(t *testing.T) {
	h, run := clientHost(t)
	importNode(t, h)
	id, out := run("--name", "otel", nodeImage, "node", "/app/detect.js")
	got := map[string]any{}
	if err := json.Unmarshal([]byte(out), &got); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	task := "arn:aws:ecs:eu-central-1:111122223333:task/default/" + id[:32]
	for key, want := range map[string]string{
		"cloud.provider":          "aws",
		"cloud.platform":          "aws_ecs",
		"cloud.region":            "eu-central-1",
		"cloud.account.id":        "111122223333",
		"aws.ecs.task.arn":        task,
		"aws.ecs.task.family":     "otel",
		"aws.ecs.launchtype":      "external",
		"aws.ecs.cluster.arn":     "arn:aws:ecs:eu-central-1:111122223333:cluster/default",
		"cloud.availability_zone": "eu-central-1a",
	} {
		if got[key] != want {
			t.Errorf("%s: got %v, want %s", key, got[key], want)
		}
	}
	container, _ := got["aws.ecs.container.arn"].(string)
	if !strings.HasPrefix(container, "arn:aws:ecs:eu-central-1:111122223333:container/default/"+
		id[:32]+"/") {
		t.Errorf("aws.ecs.container.arn: got %v", got)
	}
}

// A shell script without jq gets what such scripts take out of the documents by grep and sed.
func TestRootClientShell(t *testing.T) {
	_, run := clientHost(t)
	script := `set -e
field() { grep -o "\"$1\":\"[^\"]*\"" | head -n1 | cut -d'"' -f4; }
URI=$ECS_CONTAINER_METADATA_URI_V4
ID=${URI##*/}
test "$ID" = "${ECS_CONTAINER_METADATA_URI##*/}"
TASK=$(wget -qO- "$URI/task")
ARN=$(echo "$TASK" | field TaskARN)
AZ=$(echo "$TASK" | field AvailabilityZone)
echo "task ${ARN##*/}"
echo "region $(echo "$AZ" | sed 's/[a-z]$//')"
echo "container $(wget -qO- "$URI" | field DockerId)"
echo "v3 $(wget -qO- "$ECS_CONTAINER_METADATA_URI" | field DockerId)"
until wget -qO- "$URI/stats" | grep -q '"usage":[1-9]'; do sleep 0.1; done
echo "statistics of $(wget -qO- "$URI/stats" | field id)"`
	id, out := run("--name", "shell", testdocker.BusyboxImage, "sh", "-c", script)
	want := "task " + id[:32] + "\nregion eu-central-1\ncontainer " + id + "\nv3 " + id +
		"\nstatistics of " + id
	if out != want {
		t.Errorf("got %s\nwant %s", out, want)
	}
}

// Every container of a Compose project sees itself at /v4, its project at /v4/task and its siblings
// by name, and another project's container by that one's id only.
func TestRootComposeV4(t *testing.T) {
	h := testdocker.Shared(t)
	socket := filepath.Join(t.TempDir(), "docker.sock")
	startMetad(t, h, "--docker-proxy", socket, "--metadata-uris")
	shop := newProject(t, h, "shop4", socket)
	blog := newProject(t, h, "blog4", socket)
	services := []string{"web", "db", "cache"}
	for _, p := range []*project{shop, blog} {
		ids := map[string]string{}
		for _, s := range services {
			ids[s] = p.containers(s)[0]
		}
		for _, s := range services {
			self := ids[s]
			waitFor(t, "the whole project in "+s, func() bool {
				return len(taskOf(t,
					ask(t, h, self, "/v4/task")).Containers) == len(services)
			})
			task := taskOf(t, ask(t, h, self, "/v4/task"))
			if !strings.HasSuffix(task.TaskARN, "/"+p.name) {
				t.Errorf("%s of %s: got task %s", s, p.name, task.TaskARN)
			}
			for _, path := range []string{"/v4", "/v4/self", "/v3", "/v3/self"} {
				if got := containerOf(t, ask(t, h, self, path)); got != self {
					t.Errorf("%s of %s asks %s: got %s, want itself", s, p.name,
						path, got)
				}
			}
			for _, sibling := range services {
				if got := containerOf(t,
					ask(t, h, self,
						"/v4/containers/"+sibling)); got != ids[sibling] {
					t.Errorf("%s of %s asks for its sibling %s: got %s", s,
						p.name, sibling, got)
				}
			}
		}
	}

	mine, other := shop.containers("web")[0], blog.containers("db")[0]
	endpoint, _ := given(t, h, other)
	if got := containerOf(t, ask(t, h, mine, "/v4/"+endpoint)); got != other {
		t.Errorf("by its endpoint id: got %s, want %s", got, other)
	}
	for _, path := range []string{"/v4/" + other, "/v4/" + other[:12], "/v3/" + other,
		"/v4/containers/" + other,
		"/v4/containers/blog4-db-1", "/v4/containers/blog4_db_1", "/v2/metadata/" + other, "/v2/stats/" + other,
		"/v4/blog4", "/v4/self/containers/db/../../" + endpoint + "x"} {
		out, _, err := h.TryExec(mine, "wget", "-qO-", "http://169.254.170.2"+path)
		if err != nil || strings.Contains(out, other) || strings.Contains(out, "blog4") {
			t.Errorf("%s: got %.300s, %v: another project's", path, out, err)
		}
	}
}

// containerOf returns the Docker id in a container document.
func containerOf(t *testing.T, body string) string {
	t.Helper()
	var c struct{ DockerId string }
	if err := json.Unmarshal([]byte(body), &c); err != nil {
		t.Fatalf("not a container document: %v: %s", err, body)
	}
	return c.DockerId
}
