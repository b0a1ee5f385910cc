package server

import (
	"encoding/json"
	"fmt"
	"net/http"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"metad/pkg/task"
)

// row is a row of docs/ecs-agent.md. T, A, P, B and U are named as there: T is a known task with
// the containers A (NORMAL, running) and P (pause); B is a container of another task; U is an
// unknown source.
//
// A row has a test here; or names the file that has it, under its id, because it needs what a
// server alone does not have; or says why metad has no test of it.
type row struct {
	id     string
	says   string // what metad does, in the words of docs/ecs-agent.md; on one line, however long
	test   func(t *testing.T)
	file   string
	reason string
}

var rows = []row{
	{id: "M01", says: "T's GET /v2/metadata is answered 200, application/json, with T's document", test: func(t *testing.T) {
		h := newHost(t, testConfig(), newTask(), newOther())
		want(t, h.get(t, addrT, "/v2/metadata"), 200, typeJSON, taskDocument(task.V2, newTask()))
	}},
	{id: "M02", says: "/v2/metadata/ is the same as /v2/metadata", test: func(t *testing.T) {
		h := newHost(t, testConfig(), newTask())
		want(t, h.get(t, addrT, "/v2/metadata/"), 200, typeJSON, taskDocument(task.V2, newTask()))
	}},
	{id: "M03", says: "every method gets what GET gets", test: func(t *testing.T) {
		h := newHost(t, testConfig(), newTask())
		doc := taskDocument(task.V2, newTask())
		for _, method := range []string{"POST", "PUT", "DELETE", "PATCH", "OPTIONS", "BREW"} {
			want(t, h.do(t, addrT, method, "/v2/metadata"), 200, typeJSON, doc)
		}
		want(t, h.send(t, addrT, "POST /v2/metadata HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nhello"), 200, typeJSON, doc)
	}},
	{id: "M04", says: "HEAD gets the length of the body and no body", test: func(t *testing.T) {
		h := newHost(t, testConfig(), newTask())
		r := h.do(t, addrT, "HEAD", "/v2/metadata")
		want(t, r, 200, typeJSON, "")
		if n := int64(len(taskDocument(task.V2, newTask()))); r.ContentLength != n {
			t.Errorf("Content-Length: got %d, want %d", r.ContentLength, n)
		}
	}},
	{id: "M05", says: "a query after the path changes nothing", test: func(t *testing.T) {
		h := newHost(t, testConfig(), newTask())
		for _, query := range []string{"?x=1", "?", "?//../%zz", "?u=http://x/"} {
			want(t, h.get(t, addrT, "/v2/metadata"+query), 200, typeJSON, taskDocument(task.V2, newTask()))
		}
	}},
	{id: "M06", says: "a task's members are Cluster, TaskARN, Family, Revision, DesiredStatus, KnownStatus, Containers, Limits, PullStartedAt, PullStoppedAt, ExecutionStoppedAt, AvailabilityZone, in this order", test: func(t *testing.T) {
		tk := newTask()
		tk.Limits = task.TaskLimits{CPU: 1, Memory: 1}
		now := time.Now()
		tk.PullStartedAt, tk.PullStoppedAt, tk.ExecutionStoppedAt = now, now, now
		tk.AvailabilityZone = "us-west-2a"
		keysOf(t, taskOf(t, tk), "Cluster", "TaskARN", "Family", "Revision", "DesiredStatus", "KnownStatus", "Containers",
			"Limits", "PullStartedAt", "PullStoppedAt", "ExecutionStoppedAt", "AvailabilityZone")
	}},
	{id: "M07", says: "a task without limits has no member Limits", test: func(t *testing.T) { lacks(t, stripContainers(taskOf(t, newTask())), `"Limits"`) }},
	{id: "M08", says: "a task's Limits are its CPU in vCPUs, a fraction if need be, and its memory in MiB", test: func(t *testing.T) {
		tk := newTask()
		tk.Limits = task.TaskLimits{CPU: 0.25, Memory: 512}
		has(t, taskOf(t, tk), `"Limits":{"CPU":0.25,"Memory":512}`)
	}},
	{id: "M09", says: "a task with one limit shows that one alone", test: func(t *testing.T) {
		tk := newTask()
		tk.Limits = task.TaskLimits{CPU: 0.25}
		has(t, taskOf(t, tk), `"Limits":{"CPU":0.25}`)
		tk.Limits = task.TaskLimits{Memory: 512}
		has(t, taskOf(t, tk), `"Limits":{"Memory":512}`)
	}},
	{id: "M10", says: "times are RFC 3339 in UTC, with as many digits of the second's fraction as are not zero", test: func(t *testing.T) {
		tk := newTask()
		tk.PullStartedAt = time.Date(2024, 1, 2, 4, 4, 5, 120_000_000, time.FixedZone("", 3600))
		tk.PullStoppedAt = time.Date(2024, 1, 2, 2, 4, 5, 0, time.FixedZone("", -3600))
		has(t, taskOf(t, tk), `"PullStartedAt":"2024-01-02T03:04:05.12Z","PullStoppedAt":"2024-01-02T03:04:05Z"`)
	}},
	{id: "M11", says: "a task whose images were not pulled has no pull times", test: func(t *testing.T) { lacks(t, taskOf(t, newTask()), "PullSt") }},
	{id: "M12", says: "both A and P are in Containers, ordered by creation time, then id", test: func(t *testing.T) {
		d := decode(t, taskOf(t, newTask()))
		if len(d.Containers) != 2 || d.Containers[0].DockerID != idA || d.Containers[1].DockerID != idP {
			t.Errorf("got %+v", d.Containers)
		}
	}},
	{id: "M13", says: "P is of type CNI_PAUSE, is named ~internal~ecs~pause, and is RESOURCES_PROVISIONED when it runs", test: func(t *testing.T) {
		p := decode(t, taskOf(t, newTask())).Containers[1]
		if p.Type != "CNI_PAUSE" || p.Name != "~internal~ecs~pause" || p.KnownStatus != "RESOURCES_PROVISIONED" {
			t.Errorf("got %+v", p)
		}
	}},
	{id: "M14", says: "a task none of whose containers exists has no member Containers", test: func(t *testing.T) {
		tk := newTask()
		tk.Containers = nil
		lacks(t, taskOf(t, tk), "Containers")
	}},
	{id: "M15", says: "a container that is being created has an empty DockerId", test: func(t *testing.T) {
		tk := newTask()
		tk.Containers = append(tk.Containers, &task.Container{Name: "next", KnownStatus: task.StatusNone})
		has(t, taskOf(t, tk), `{"DockerId":"","Name":"next"`)
	}},
	{id: "M16", says: "a container whose image was pulled, and no more, is not listed", test: func(t *testing.T) {
		tk := newTask()
		tk.Containers = append(tk.Containers, &task.Container{Name: "next", KnownStatus: task.StatusPulled})
		lacks(t, taskOf(t, tk), `"next"`)
	}},
	{id: "M17", says: "a stopped container stays listed, with ExitCode, 0 included, and FinishedAt", test: func(t *testing.T) {
		tk := newTask()
		stop(tk.Containers[0])
		doc := taskOf(t, tk)
		has(t, doc, `"KnownStatus":"STOPPED","ExitCode":0,`)
		has(t, doc, `"FinishedAt":"2024-01-02T03:04:07Z"`)
		if n := len(decode(t, doc).Containers); n != 2 {
			t.Errorf("got %d containers, want 2", n)
		}
	}},
	{id: "M18", says: "a running container has neither ExitCode nor FinishedAt", test: func(t *testing.T) {
		doc := taskOf(t, newTask())
		lacks(t, doc, "ExitCode")
		lacks(t, doc, "FinishedAt")
	}},
	{id: "M19", says: "a container's members are DockerId, Name, DockerName, Image, ImageID, Ports, Labels, DesiredStatus, KnownStatus, ExitCode, Limits, CreatedAt, StartedAt, FinishedAt, Type, Networks, Health, Volumes, in this order", test: func(t *testing.T) {
		c := running(idA, "app")
		stop(c)
		c.Ports = []task.Port{{ContainerPort: 80, Protocol: "tcp", HostPort: 80}}
		c.Health = &task.Health{}
		c.Volumes = []task.Volume{{Source: "/a", Destination: "/b"}}
		keysOf(t, containerOf(t, c), "DockerId", "Name", "DockerName", "Image", "ImageID", "Ports", "Labels", "DesiredStatus",
			"KnownStatus", "ExitCode", "Limits", "CreatedAt", "StartedAt", "FinishedAt", "Type", "Networks", "Health", "Volumes")
	}},
	{id: "M20", says: "a container without CPU units shows 2, the least that Linux grants; the 2017 agent showed 0", test: func(t *testing.T) {
		c := running(idA, "app")
		c.Limits = task.ContainerLimits{CPU: 0, Memory: 50}
		has(t, containerOf(t, c), `"Limits":{"CPU":2,"Memory":50}`)
	}},
	{id: "M21", says: "a container's CPU units are written as an integer", test: func(t *testing.T) { has(t, containerOf(t, running(idA, "app")), `"CPU":10,`) }},
	{id: "M22", says: "DockerName has no leading slash", test: func(t *testing.T) { has(t, containerOf(t, running(idA, "app")), `"DockerName":"ecs-web-7-app-`) }},
	{id: "M23", says: "every container of an awsvpc task, P included, has one network: awsvpc, with the addresses of the task's network interface", test: func(t *testing.T) {
		for _, c := range decode(t, taskOf(t, newTask())).Containers {
			if got := string(c.Networks); got != `[{"NetworkMode":"awsvpc","IPv4Addresses":["192.0.2.3"]}]` {
				t.Errorf("%s: got %s", c.Name, got)
			}
		}
	}},
	{id: "M24", says: "an interface without IPv6 gives no member IPv6Addresses", test: func(t *testing.T) { lacks(t, taskOf(t, newTask()), "IPv6Addresses") }},
	{id: "M25", says: "in a task with a network interface, HostPort is ContainerPort", test: func(t *testing.T) {
		c := running(idA, "app")
		c.Ports = []task.Port{{ContainerPort: 80, Protocol: "tcp", HostPort: 8080}}
		has(t, containerOf(t, c), `"Ports":[{"ContainerPort":80,"Protocol":"tcp","HostPort":80}]`)
	}},
	{id: "M26", says: "Ports are the bindings that Docker reports; the 2017 agent took them from the task definition", file: "pkg/docker/describe_test.go"},
	{id: "M27", says: "Labels are sorted by key, the five of ECS among them", test: func(t *testing.T) {
		var c struct{ Labels json.RawMessage }
		if err := json.Unmarshal([]byte(containerOf(t, running(idA, "app"))), &c); err != nil {
			t.Fatal(err)
		}
		keysOf(t, string(c.Labels), "com.amazonaws.ecs.cluster", "com.amazonaws.ecs.container-name", "com.amazonaws.ecs.task-arn",
			"com.amazonaws.ecs.task-definition-family", "com.amazonaws.ecs.task-definition-version")
	}},
	{id: "M28", says: "<, > and & in a string are written as \\u003c, \\u003e and \\u0026", test: func(t *testing.T) {
		c := running(idA, "app")
		c.Labels = map[string]string{"k": "<a>&"}
		has(t, containerOf(t, c), `"Labels":{"k":"\u003ca\u003e\u0026"}`)
	}},
	{id: "M29", says: "a container whose health check has not spoken yet has an empty Health", test: func(t *testing.T) {
		c := running(idA, "app")
		c.Health = &task.Health{}
		has(t, containerOf(t, c), `"Health":{}`)
	}},
	{id: "M30", says: "a healthy container shows status, statusSince and output, and no exitCode", test: func(t *testing.T) {
		c := running(idA, "app")
		c.Health = &task.Health{Status: "HEALTHY", Since: c.StartedAt, Output: "hello\n"}
		has(t, containerOf(t, c), `"Health":{"status":"HEALTHY","statusSince":"2024-01-02T03:04:06Z","output":"hello\n"}`)
	}},
	{id: "M31", says: "a container without a health check has no Health", test: func(t *testing.T) { lacks(t, containerOf(t, running(idA, "app")), "Health") }},
	{id: "M32", says: "Volumes are Docker's mounts: DockerName, Source, Destination", test: func(t *testing.T) {
		c := running(idA, "app")
		c.Volumes = []task.Volume{{DockerName: "shared-local", Source: "/var/lib/docker/volumes/shared-local/_data", Destination: "/ecs"}}
		has(t, containerOf(t, c), `"Volumes":[{"DockerName":"shared-local","Source":"/var/lib/docker/volumes/shared-local/_data","Destination":"/ecs"}]`)
	}},
	{id: "M33", says: "without a zone there is no member AvailabilityZone", test: func(t *testing.T) { lacks(t, taskOf(t, newTask()), "AvailabilityZone") }},
	{id: "M34", says: "LogDriver, LogOptions, ContainerARN, LaunchType, Errors and HostIp are never in a v2 document", test: func(t *testing.T) {
		tk := newTask()
		tk.ContainerInstanceARN = "arn:ci"
		tk.Containers[0].Ports = []task.Port{{ContainerPort: 80, HostIP: "0.0.0.0"}}
		for _, key := range []string{"LogDriver", "LogOptions", "ContainerARN", "LaunchType", "Errors", "HostIp", "ContainerInstanceARN"} {
			lacks(t, taskOf(t, tk), key)
		}
	}},

	{id: "C01", says: "/v2/metadata/<id of A> is A's element of the task's document", test: func(t *testing.T) {
		h := newHost(t, testConfig(), newTask())
		r := h.get(t, addrT, "/v2/metadata/"+idA)
		var doc struct{ Containers []json.RawMessage }
		if err := json.Unmarshal([]byte(h.get(t, addrT, "/v2/metadata").body), &doc); err != nil {
			t.Fatal(err)
		}
		want(t, r, 200, typeJSON, string(doc.Containers[0]))
	}},
	{id: "C02", says: "P can be asked for too", test: func(t *testing.T) {
		h := newHost(t, testConfig(), newTask())
		want(t, h.get(t, addrT, "/v2/metadata/"+idP), 200, typeJSON, containerDocument(task.V2, pause()))
	}},
	{id: "C03", says: "a query after a container's id changes nothing; for the 2017 agent it was part of the id", test: func(t *testing.T) {
		h := newHost(t, testConfig(), newTask())
		want(t, h.get(t, addrT, "/v2/metadata/"+idA+"?x=1"), 200, typeJSON, containerDocument(task.V2, running(idA, "app")))
	}},
	{id: "C04", says: "a slash after an id is part of the id, so there is no such container", test: func(t *testing.T) { wantNoContainer(t, idA+"/", idA+"/") }},
	{id: "C05", says: "the first 12 characters of an id name no container", test: func(t *testing.T) { wantNoContainer(t, idA[:12], idA[:12]) }},
	{id: "C06", says: "an unknown id is answered 400, with the id in the text", test: func(t *testing.T) { wantNoContainer(t, "nope", "nope") }},
	{id: "C07", says: "an id may hold slashes, plain or escaped, and the text shows them plain", test: func(t *testing.T) {
		wantNoContainer(t, "a/b", "a/b")
		wantNoContainer(t, "a%2Fb", "a/b")
	}},
	{id: "C08", says: "the id in the text is escaped as any string of JSON", test: func(t *testing.T) {
		wantNoContainer(t, "<x>&", `\u003cx\u003e\u0026`)
		wantNoContainer(t, "%00%ff", `\u0000\ufffd`)
		wantNoContainer(t, "\xff\"", `\ufffd\"`)
	}},
	{id: "C09", says: "T is told that B does not exist", test: func(t *testing.T) { wantNoContainer(t, idB, idB) }}, // departure: the agent gives B away
	{id: "C10", says: "a container's name is no id", test: func(t *testing.T) {
		name := running(idA, "app").DockerName
		wantNoContainer(t, name, name)
	}},

	{id: "E01", says: "a request from U is answered 400, with U's address in the text, if no task takes the address within --unknown-wait", test: func(t *testing.T) { unknown(t, "/v2/metadata") }},
	{id: "E02", says: "U gets the same text on every v2 path, whatever id it asks for", test: func(t *testing.T) {
		for _, target := range []string{"/v2/metadata/" + idA, "/v2/stats", "/v2/stats/" + idA, "/v2/metadataWithTags"} {
			unknown(t, target)
		}
	}},
	{id: "E03", says: "the text has no \"v2 handler\", which the 2017 agent's had", test: func(t *testing.T) { // an older agent's text, which ours is not
		h := newHost(t, testConfig(), newTask())
		lacks(t, h.get(t, addrU, "/v2/metadata").body, "v2 handler")
	}},
	{id: "E04", says: "processes of the host are no better known than U; a container is its task, by its address or, on the host's network, by its cgroup", test: func(t *testing.T) { // a source that never becomes a task waits, and then is told the same
		cfg := testConfig()
		cfg.UnknownWait = time.Millisecond
		h := newHost(t, cfg, newTask())
		want(t, h.get(t, addrU, "/v2/metadata"), 400, typeJSON, unknownBody)
		h.cfg.HostAddr = addrU // a process of the host is told at once
		h.cfg.UnknownWait = time.Minute
		want(t, h.get(t, addrU, "/v2/metadata"), 400, typeJSON, unknownBody)
	}},
	{id: "E05", says: "no header can name another source", test: func(t *testing.T) {
		h := newHost(t, testConfig(), newTask())
		for _, header := range []string{"X-Forwarded-For", "X-Real-IP", "Forwarded"} {
			want(t, h.get(t, addrU, "/v2/metadata", header+": "+addrT.String()), 400, typeJSON, unknownBody)
		}
	}},
	{id: "E06", says: "after the task is gone, a connection it left is answered 400, with the ARN in the text", test: func(t *testing.T) {
		h := newHost(t, testConfig(), newTask())
		c := newLoopConn(addrT)
		h.serveLoop(t, c)
		c.get(request("/v2/metadata"))
		if err := h.table.Apply(nil); err != nil {
			t.Fatal(err)
		}
		h.cfg.UnknownWait = time.Minute // which would be for nothing
		for target, text := range map[string]string{
			"/v2/metadata":        `"Unable to generate metadata for task: '` + arnT + `'"`,
			"/v2/metadata/" + idA: `"Unable to generate metadata for container '` + idA + `'"`,
			"/v2/stats":           `"Unable to get task stats for: ` + arnT + `"`,
			"/v2/stats/" + idA:    `"Unable to get container stats for: ` + idA + `"`,
		} {
			if got := string(c.get(request(target))); !strings.HasPrefix(got, "HTTP/1.1 400 ") || !strings.HasSuffix(got, "\r\n\r\n"+text) {
				t.Errorf("%s: got %s", target, got)
			}
		}
		h.cfg.UnknownWait = 0
		// Somebody new at the address was never anybody.
		want(t, h.get(t, addrT, "/v2/metadata"), 400, typeJSON, strings.ReplaceAll(unknownBody, addrU.String(), addrT.String()))
	}},
	{id: "E07", says: "an address that has passed to another task gets that task's document", test: func(t *testing.T) {
		h := newHost(t, testConfig(), newTask())
		h.get(t, addrT, "/v2/metadata")
		next := newOther()
		next.Endpoints[0].Addr = addrT
		if err := h.table.Apply([]*task.Task{next}); err != nil {
			t.Fatal(err)
		}
		want(t, h.get(t, addrT, "/v2/metadata"), 200, typeJSON, taskDocument(task.V2, next))
	}},
	{id: "E08", says: "after a restart, running tasks are known before the first answer", file: "cmd/metad/serve_root_test.go"},

	{id: "S01", says: "/v2/stats is an object whose keys are the full ids of A and P", test: func(t *testing.T) {
		h := newHost(t, testConfig(), sampled())
		want(t, h.get(t, addrT, "/v2/stats"), 200, typeJSON, `{"`+idA+`":`+sampleA+`,"`+idP+`":`+sampleP+`}`)
	}},
	{id: "S02", says: "/v2/stats/ is the same as /v2/stats", test: func(t *testing.T) {
		h := newHost(t, testConfig(), sampled())
		want(t, h.get(t, addrT, "/v2/stats/"), 200, typeJSON, `{"`+idA+`":`+sampleA+`,"`+idP+`":`+sampleP+`}`)
	}},
	{id: "S03", says: "/v2/stats/<id of A> is A's last sample in Docker's form; ?stream=true goes on with each new one", test: func(t *testing.T) {
		tk := sampled()
		h := newHost(t, testConfig(), tk)
		want(t, h.get(t, addrT, "/v2/stats/"+idA), 200, typeJSON, sampleA) // what is in it: pkg/stats
		if tk.Containers[0].Stats.Asked() == 0 || tk.Containers[1].Stats.Asked() != 0 {
			t.Error("the sampler was not told that A, and only A, was asked for")
		}
	}},
	{id: "S04", says: "P has statistics too", test: func(t *testing.T) {
		h := newHost(t, testConfig(), sampled())
		want(t, h.get(t, addrT, "/v2/stats/"+idP), 200, typeJSON, sampleP)
	}},
	{id: "S05", says: "a container without a sample is null, also before its start is known", test: func(t *testing.T) {
		tk := newTask()
		h := newHost(t, testConfig(), tk)
		want(t, h.get(t, addrT, "/v2/stats/"+idA), 200, typeJSON, "null")
		if d := time.Since(time.Unix(0, tk.Containers[0].Stats.Asked())); d < 0 || d > time.Minute {
			t.Errorf("asked %v ago, want just now", d)
		}
		// Departure: nor is it known that A was started. Who else would ask for it?
		created := newTask()
		created.Containers[0].PID, created.Containers[0].State, created.Containers[0].KnownStatus = 0, "created", task.StatusCreated
		h = newHost(t, testConfig(), created)
		want(t, h.get(t, addrT, "/v2/stats/"+idA), 200, typeJSON, "null")
		// ECS_DISABLE_METRICS, also where a sample is left from before.
		cfg := testConfig()
		cfg.NoStats = true
		h = newHost(t, cfg, sampled())
		want(t, h.get(t, addrT, "/v2/stats"), 200, typeJSON, `{"`+idA+`":null,"`+idP+`":null}`)
		for _, query := range []string{"", "?stream=true"} {
			want(t, h.get(t, addrT, "/v2/stats/"+idA+query), 400, typeJSON, `"Unable to get container stats for: `+idA+`"`)
		}
	}},
	{id: "S06", says: "in a task's statistics a container without a sample is null too", test: func(t *testing.T) {
		tk := sampled()
		tk.Containers[0].Stats.Store(nil)
		h := newHost(t, testConfig(), tk)
		want(t, h.get(t, addrT, "/v2/stats"), 200, typeJSON, `{"`+idA+`":null,"`+idP+`":`+sampleP+`}`)
	}},
	{id: "S07", says: "a stopped container's statistics are answered 400, with its id in the text", test: func(t *testing.T) {
		tk := sampled()
		stop(tk.Containers[0]) // the last sample may still be in the cell
		h := newHost(t, testConfig(), tk)
		want(t, h.get(t, addrT, "/v2/stats/"+idA), 400, typeJSON, `"Unable to get container stats for: `+idA+`"`)
	}},
	{id: "S08", says: "in a task's statistics a stopped container is null", test: func(t *testing.T) {
		tk := sampled()
		stop(tk.Containers[0])
		h := newHost(t, testConfig(), tk)
		want(t, h.get(t, addrT, "/v2/stats"), 200, typeJSON, `{"`+idA+`":null,"`+idP+`":`+sampleP+`}`)
	}},
	{id: "S09", says: "B's statistics are not for T: 400", test: func(t *testing.T) {
		h := newHost(t, testConfig(), sampled(), newOther())
		want(t, h.get(t, addrT, "/v2/stats/"+idB), 400, typeJSON, `"Unable to get container stats for: `+idB+`"`)
	}},
	{id: "S10", says: "the statistics of an unknown id are answered 400, with the id in the text", test: func(t *testing.T) {
		h := newHost(t, testConfig(), sampled())
		want(t, h.get(t, addrT, "/v2/stats/n%6Fpe"), 400, typeJSON, `"Unable to get container stats for: nope"`)
	}},
	{id: "S11", says: "a task with no container left has empty statistics", test: func(t *testing.T) {
		tk := newTask()
		tk.Containers = []*task.Container{}
		h := newHost(t, testConfig(), tk)
		want(t, h.get(t, addrT, "/v2/stats"), 200, typeJSON, "{}")
	}},
	{id: "S12", says: "a task whose containers are not known at all has none: 400, with the ARN in the text", test: func(t *testing.T) {
		tk := newTask()
		tk.Containers = nil
		h := newHost(t, testConfig(), tk)
		want(t, h.get(t, addrT, "/v2/stats"), 400, typeJSON, `"Unable to get task stats for: `+arnT+`"`)
	}},
	{id: "S13", says: "a sample that is all zeros has the members that Docker never leaves out, and no other", file: "pkg/stats/parse_test.go"},
	{id: "S14", says: "a sample ends in name, id and networks; the 2017 agent dropped the first two", file: "pkg/stats/tree_test.go"},
	{id: "S15", says: "all containers of an awsvpc task have the counters of the task's eth0, and none of ecs-eth0", file: "pkg/stats/tree_test.go"},
	{id: "S16", says: "a container without a sample is null even if its task's network counters are there", test: func(t *testing.T) { // P's sample, which has the task's network counters, is there; A's is not
		tk := sampled()
		tk.Containers[0].Stats.Store(nil)
		h := newHost(t, testConfig(), tk)
		want(t, h.get(t, addrT, "/v2/stats/"+idA), 200, typeJSON, "null")
	}},
	{id: "S17", says: "a sample is about a second old at most", file: "pkg/stats/sampler_test.go"},
	{id: "S18", says: "counters are cumulative integers that never fall while the container runs", file: "pkg/stats/tree_test.go"},

	{id: "R01", says: "a path that does not exist is answered 404 in plain text; paths are case-sensitive", test: func(t *testing.T) {
		h := newHost(t, testConfig(), newTask())
		for _, target := range []string{"/", "/v2", "/v2/", "/v2/meta", "/v2/METADATA", "/nope", "/v2/statss", "/v2/metadataWithTags/x"} {
			r := h.get(t, addrT, target)
			want(t, r, 404, typeText, "404 page not found\n")
			if got := r.Header.Get("X-Content-Type-Options"); got != "nosniff" {
				t.Errorf("X-Content-Type-Options: got %q", got)
			}
		}
	}},
	{id: "R02", says: "a doubled slash is answered 301 to the clean path, without rate-limit headers", test: func(t *testing.T) {
		moved(t, "//v2/metadata", "/v2/metadata")
		moved(t, "/v2//metadata//", "/v2/metadata/")
	}},
	{id: "R03", says: "a redirect keeps the query", test: func(t *testing.T) {
		moved(t, "/v2//stats?x=y", "/v2/stats?x=y")
		moved(t, "/v2//stats?u=http://x/", "/v2/stats?u=http://x/")
	}},
	{id: "R04", says: "/./ and /../ are resolved by a redirect too", test: func(t *testing.T) {
		moved(t, "/v2/./metadata", "/v2/metadata")
		moved(t, "/v2/x/../stats", "/v2/stats")
		moved(t, "/v2/x/%2e%2e/stats", "/v2/stats")
		moved(t, "/v2/%2F/a%20b", "/v2/a%20b")
	}},
	{id: "R05", says: "/v2/metadata/.. leads to /v2", test: func(t *testing.T) { moved(t, "/v2/metadata/..", "/v2") }},
	{id: "R06", says: "an id with a line feed is a path that does not exist", test: func(t *testing.T) {
		h := newHost(t, testConfig(), newTask())
		r := h.get(t, addrT, "/v2/metadata/%0Ax")
		want(t, r, 404, typeText, "404 page not found\n")
		if got := r.Header.Values("X-Rate-Limit-Limit"); got != nil {
			t.Errorf("X-Rate-Limit-Limit: got %q, want none", got)
		}
	}},
	{id: "R07", says: "a redirect has no body and no type; the 2017 agent's had a line of HTML", test: func(t *testing.T) {
		h := newHost(t, testConfig(), newTask())
		r := h.get(t, addrT, "//v2/metadata")
		want(t, r, 301, "", "")
		if _, ok := r.Header["Content-Type"]; ok || r.ContentLength != 0 {
			t.Errorf("got %v", r.Header)
		}
	}},

	{id: "H01", says: "every answer but a redirect has four rate-limit headers, an empty Forwarded-For among them", test: func(t *testing.T) {
		h := newHost(t, testConfig(), newTask())
		for target, status := range map[string]int{"/v2/metadata": 200, "/v2/metadata/nope": 400, "/nope": 404} {
			c := h.dial(t, addrT)
			fmt.Fprintf(c, "GET %s HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", target)
			raw := readAll(t, c)
			has(t, raw, fmt.Sprintf("HTTP/1.1 %d ", status))
			for _, line := range []string{"X-Rate-Limit-Limit: 40.00", "X-Rate-Limit-Duration: 1",
				"X-Rate-Limit-Request-Forwarded-For: ", "X-Rate-Limit-Request-Remote-Addr: " + c.LocalAddr().String()} {
				has(t, raw, "\r\n"+line+"\r\n")
			}
			has(t, raw, "\r\nDate: ")
			lacks(t, raw, "\r\nServer:")
		}
	}},
	{id: "H02", says: "X-Rate-Limit-Limit is the limit with two decimals, and the agent's default without a limit", test: func(t *testing.T) {
		cfg := testConfig()
		cfg.Rate = RateLimit{100, 150}
		h := newHost(t, cfg, newTask())
		if got := h.get(t, addrT, "/v2/metadata").Header.Get("X-Rate-Limit-Limit"); got != "100.00" {
			t.Errorf("got %q", got)
		}
	}},
	{id: "H03", says: "the request's X-Forwarded-For comes back in X-Rate-Limit-Request-Forwarded-For", test: func(t *testing.T) {
		h := newHost(t, testConfig(), newTask())
		if got := h.get(t, addrT, "/v2/metadata", "x-forwarded-for: a").Header.Get("X-Rate-Limit-Request-Forwarded-For"); got != "a" {
			t.Errorf("got %q", got)
		}
	}},
	{id: "H04", says: "JSON is application/json without a charset, and no line feed follows it", test: func(t *testing.T) {
		h := newHost(t, testConfig(), sampled())
		for _, target := range []string{"/v2/metadata", "/v2/metadata/" + idA, "/v2/stats", "/v2/stats/" + idA, "/v2/metadata/x", "/v2/stats/x"} {
			r := h.get(t, addrT, target)
			if got := r.Header.Values("Content-Type"); !slices.Equal(got, []string{"application/json"}) || strings.HasSuffix(r.body, "\n") {
				t.Errorf("%s: got %q, %q", target, got, r.body)
			}
			if len(r.TransferEncoding) > 0 || r.ContentLength != int64(len(r.body)) {
				t.Errorf("%s: got Content-Length %d, want %d", target, r.ContentLength, len(r.body))
			}
		}
	}},

	{id: "L01", says: "a request beyond the burst is answered 429 in plain text", test: func(t *testing.T) {
		h := newLimited(t)
		r := h.exhaust(t)
		want(t, r, 429, typeText, "You have reached maximum request limit.")
	}},
	{id: "L02", says: "all paths of a task share one limit", test: func(t *testing.T) { // departure: a task's paths share its bucket
		h := newLimited(t)
		h.exhaust(t)
		want(t, h.get(t, addrT, "/v2/stats"), 429, typeText, "You have reached maximum request limit.")
	}},
	{id: "L03", says: "another task is not limited with it", test: func(t *testing.T) {
		h := newLimited(t)
		h.exhaust(t)
		want(t, h.get(t, addrB, "/v2/metadata"), 200, typeJSON, taskDocument(task.V2, newOther()))
	}},
	{id: "L04", says: "another query or method counts towards the same limit", test: func(t *testing.T) {
		h := newLimited(t)
		h.exhaust(t)
		want(t, h.get(t, addrT, "/v2/metadata?x=1"), 429, typeText, "You have reached maximum request limit.")
		want(t, h.do(t, addrT, "POST", "/v2/metadata"), 429, typeText, "You have reached maximum request limit.")
	}},
	{id: "L05", says: "/v2/metadata and /v2/metadata/ share one limit", test: func(t *testing.T) { // departure, as L02
		h := newLimited(t)
		h.exhaust(t)
		want(t, h.get(t, addrT, "/v2/metadata/"), 429, typeText, "You have reached maximum request limit.")
	}},
	{id: "L06", says: "a path that does not exist counts too, unless it is passed to the agent, whose limit it meets", test: func(t *testing.T) {
		h := newLimited(t)
		h.exhaust(t)
		want(t, h.get(t, addrT, "/nope"), 429, typeText, "You have reached maximum request limit.")
	}},
	{id: "L07", says: "a redirect neither counts nor is refused", test: func(t *testing.T) {
		h := newLimited(t)
		h.exhaust(t)
		want(t, h.get(t, addrT, "/v2//stats"), 301, "", "")
		h.clock.advance(time.Second)
		for range limitedRate.PerSecond + 1 {
			want(t, h.get(t, addrT, "//v2/stats"), 301, "", "")
		}
		if r := h.get(t, addrT, "/v2/stats"); r.StatusCode != 200 {
			t.Errorf("a redirect used a token: got %d", r.StatusCode)
		}
	}},
	{id: "L08", says: "a second later as many requests pass as the rate says", test: func(t *testing.T) {
		h := newLimited(t)
		h.exhaust(t)
		h.clock.advance(time.Second)
		for range limitedRate.PerSecond {
			if r := h.get(t, addrT, "/v2/metadata"); r.StatusCode != 200 {
				t.Fatalf("got %d", r.StatusCode)
			}
		}
		if r := h.get(t, addrT, "/v2/metadata"); r.StatusCode != 429 {
			t.Errorf("got %d, want 429", r.StatusCode)
		}
	}},
	{id: "L09", says: "ECS_TASK_METADATA_RPS_LIMIT is \"rate,burst\"; anything else means 40,60", test: func(t *testing.T) {
		f := func(text string, want RateLimit) {
			t.Helper()
			good := want != RateLimit{40, 60}
			if got, ok := ParseRateLimit(text); got != want || ok != good {
				t.Errorf("%q: got %v %v, want %v %v", text, got, ok, want, good)
			}
		}
		f("100,150", RateLimit{100, 150})
		f(" 100 , 150 ", RateLimit{100, 150})
		for _, text := range []string{"x", "0,5", "5", "5,0", "-1,5", "1,2,3", ",", "1.5,2", "99999999999999999999,1"} {
			f(text, RateLimit{40, 60})
		}
		f("", RateLimit{})
	}},
	{id: "L10", says: "a 429 has the rate-limit headers and a Retry-After", test: func(t *testing.T) {
		h := newLimited(t)
		r := h.exhaust(t)
		for _, name := range []string{"X-Rate-Limit-Limit", "X-Rate-Limit-Duration", "X-Rate-Limit-Request-Forwarded-For", "X-Rate-Limit-Request-Remote-Addr"} {
			if len(r.Header.Values(name)) != 1 {
				t.Errorf("%s: got %q", name, r.Header.Values(name))
			}
		}
		if got := r.Header.Get("Retry-After"); got != "1" { // departure
			t.Errorf("Retry-After: got %q, want 1", got)
		}
	}},

	{id: "W01", says: "/v2/metadataWithTags adds the tags of the task and of the container instance", test: func(t *testing.T) {
		a := newAgent(t)
		tk := newTask()
		tk.Containers[0].EndpointID = endpointA
		h := newHost(t, a.config(), tk)
		for _, target := range []string{"/v2/metadataWithTags", "/v2/metadataWithTags/", "/v2/metadata/taskWithTags"} {
			r := h.get(t, addrT, target)
			want(t, r, 200, typeJSON, taggedT)
			has(t, r.body, `"TaskTags":{`)
			has(t, r.body, `"ContainerInstanceTags":{`)
		}
	}},
	{id: "W02", says: "if the tags cannot be had, the document comes without them, 200", test: func(t *testing.T) {
		plain := taskDocument(task.V2, newTask())
		with := func(cfg Config, endpoint string) {
			t.Helper()
			tk := newTask()
			tk.Containers[0].EndpointID = endpoint
			h := newHost(t, cfg, tk)
			want(t, h.get(t, addrT, "/v2/metadataWithTags"), 200, typeJSON, plain)
		}
		with(testConfig(), endpointA) // no agent
		with(newAgent(t).config(), "")
		with(newAgent(t).config(), "unknown")
		with(newAgent(t).config(), endpointB) // another task's
		unasked := newAgent(t)
		with(unasked.config(), "../v2/x y")
		if got := unasked.requests(); len(got) != 0 {
			t.Errorf("the agent got %q", got)
		}
		gone := testConfig()
		gone.AgentURL = "http://" + refusing(t)
		with(gone, endpointA)
		silent := testConfig()
		silent.AgentURL = "http://" + mute(t)
		silent.AgentTimeout = 20 * time.Millisecond
		with(silent, endpointA)
	}},
	{id: "W03", says: "there is no form with tags for a container", test: func(t *testing.T) {
		h := newHost(t, testConfig(), newTask())
		want(t, h.get(t, addrT, "/v2/metadataWithTags/"+idA), 404, typeText, "404 page not found\n")
		a := newAgent(t)
		h = newHost(t, a.config(), newTask())
		want(t, h.get(t, addrT, "/v2/metadataWithTags/"+idA), 404, typeText, "404 page not found\n")
		a.got(t, "GET /v2/metadataWithTags/"+idA+" HTTP/1.1")
	}},

	{id: "K01", says: "credentials without an id: 400, NoIdInRequest", test: func(t *testing.T) {
		h := newHost(t, newAgent(t).config(), newTask())
		body := `{"code":"NoIdInRequest","message":"CredentialsV2Request: No Credential ID in the request","HTTPErrorCode":400}`
		want(t, h.get(t, addrT, "/v2/credentials/"), 400, typeJSON, body)
		want(t, h.get(t, addrT, "/v1/credentials"), 400, typeJSON, body)
	}},
	{id: "K02", says: "credentials with an unknown id: 400, InvalidIdInRequest", test: func(t *testing.T) {
		h := newHost(t, newAgent(t).config(), newTask())
		body := `{"code":"InvalidIdInRequest","message":"CredentialsV2Request: Credentials not found","HTTPErrorCode":400}`
		want(t, h.get(t, addrT, "/v2/credentials/unknown"), 400, typeJSON, body)
		want(t, h.get(t, addrT, "/v1/credentials?id=unknown"), 400, typeJSON, body)
	}},
	{id: "K03", says: "credentials are given to anyone with the id, from whatever address", test: func(t *testing.T) { // from any source: the id in the path is the proof
		a := newAgent(t)
		h := newHost(t, a.config(), newTask())
		want(t, h.get(t, addrT, "/v2/credentials/"+credentialsID), 200, typeJSON, credentials)
		want(t, h.get(t, addrU, "/v1/credentials?id="+credentialsID), 200, typeJSON, credentials)
		a.got(t, "GET /v1/credentials?id="+credentialsID+" HTTP/1.1")
	}},
	{id: "K04", says: "the agent's own API is at /api/<endpoint id>; a wrong method is answered 405 without a body", test: func(t *testing.T) {
		a := newAgent(t)
		h := newHost(t, a.config(), newTask())
		want(t, h.get(t, addrT, "/api/e/task-protection/v1/state"), 200, typeJSON, `{"protection":{}}`)
		want(t, h.send(t, addrT, "PUT /api/e/task-protection/v1/state HTTP/1.1\r\nHost: x\r\nContent-Length: 26\r\n\r\n{\"ProtectionEnabled\":true}"),
			200, typeJSON, `{"protection":{"ProtectionEnabled":true}}`)
		r := h.do(t, addrT, "DELETE", "/api/e/task-protection/v1/state")
		want(t, r, 405, "", "")
	}},

	{id: "N01", says: "an awsvpc task has ecs-eth0 with an address of 169.254.172.0/22, and routes to 169.254.170.2 and its gateway alone", file: "internal/testdocker/testdocker_root_test.go"},
	{id: "N02", says: "the server sees the task's own address", file: "internal/testdocker/testdocker_root_test.go"},
	{id: "N03", says: "two tasks have two addresses; the containers of one task share one", test: func(t *testing.T) { // two tasks are two addresses; who shares an address is one task
		h := newHost(t, testConfig(), newTask(), newOther())
		want(t, h.get(t, addrT, "/v2/metadata"), 200, typeJSON, taskDocument(task.V2, newTask()))
		want(t, h.get(t, addrB, "/v2/metadata"), 200, typeJSON, taskDocument(task.V2, newOther()))
	}},
	{id: "N04", says: "nothing outside the host reaches the agent's port 51679", reason: "51679 is the agent's port: metad's own listener is in a namespace to which only bridge ports lead"},

	{id: "V01", says: "/v3/<eid> is the container's document in the form of v2, for any caller", test: testV01},
	{id: "V02", says: "/v3/<eid>/task, /stats and /task/stats are in the form of v2", test: testV02},
	{id: "V03", says: "metadata of an unknown id in v3 is answered 500, with a text that names the id", test: testV03},
	{id: "V04", says: "statistics of an unknown id in v3 are answered 400, with a text that names the id", test: testV04},
	{id: "V05", says: "a slash at the end of a v3 path makes it a path that does not exist", test: testV05},
	{id: "V06", says: "/v4/<eid> is the container's document, with Networks last and fuller: index, MAC, subnet, DNS", test: testV06},
	{id: "V07", says: "/v4/<eid>/task is the task's document, with Containers after Errors and FaultInjectionEnabled always there", test: testV07},
	{id: "V08", says: "an unknown id in v4 is answered 404 with a string of JSON, an empty one too", test: testV08},
	{id: "V09", says: "a v4 sample ends in network_rate_stats once there are two samples to compare", test: testV09},
	{id: "V10", says: "a container without a sample is {} in v4, alone and in its task's statistics", test: testV10},
	{id: "V11", says: "/v4/<eid>/taskWithTags is the agent's answer, Errors included; without an agent it is 200, without tags and Errors", test: testV11},
	{id: "V12", says: "/v4/<eid>/networks does not exist, and /v4/<eid>/tasks only for a container with the label metad.host-tasks=true", test: testV12},
	{id: "V13", says: "outside awsvpc, Networks are Docker's, and an empty address on the host's network", test: testV13},

	{id: "F01", says: "the file is off unless the variable, a flag or the container's label turns it on", file: "pkg/dockerproxy/proxy_test.go"},
	{id: "F02", says: "a container gets a read-only directory in the form of the proposal or of the agent, and the file's path in the variable", file: "pkg/dockerproxy/proxy_test.go"},
	{id: "F03", says: "the containers that the agent adds to a task get no file", file: "pkg/dockerproxy/proxy_test.go"},
	{id: "F04", says: "before the start the file is valid JSON without status and networks; what is known of the container is in it", file: "pkg/mdfile/document_test.go"},
	{id: "F05", says: "soon after the start the file says READY and holds Docker's facts, and it follows every change", file: "pkg/mdfile/document_test.go"},
	{id: "F06", says: "a reader never sees a part of the file, and the path always exists", file: "pkg/mdfile/tree_test.go"},
	{id: "F07", says: "the file's mode is 0644", file: "pkg/mdfile/tree_test.go"},
	{id: "F08", says: "the JSON is indented by a tab, without a line feed at the end", file: "pkg/mdfile/document_test.go"},
	{id: "F09", says: "DockerContainerName has its leading slash", file: "pkg/mdfile/document_test.go"},
	{id: "F10", says: "a port mapping has the agent's members and BindIP; without ports there is no member", file: "pkg/mdfile/document_test.go"},
	{id: "F11", says: "a container without Docker networks has one, named by its network mode, with an empty address", file: "pkg/mdfile/document_test.go"},
	{id: "F12", says: "a container that exits before the agent looked keeps a file that is not READY", file: "pkg/mdfile/writer_test.go"},
	{id: "F13", says: "the directory of a task with a long ARN has two levels, cluster and id", file: "pkg/mdfile/layout_test.go"},
	{id: "F14", says: "a malformed ARN means no file, and the container starts all the same", file: "pkg/dockerproxy/proxy_test.go"},
	{id: "F15", says: "with SELinux the mount is relabelled", file: "pkg/dockerproxy/proxy_test.go"},
	{id: "F16", says: "a container's directory goes with the container", file: "pkg/mdfile/writer_test.go"},
	{id: "F17", says: "after a restart the file of a running container becomes READY", file: "pkg/mdfile/writer_test.go"},
	{id: "F18", says: "the user's variables and mounts stay, and the file's come after them; a container that has the variable gets no file", file: "pkg/dockerproxy/body_test.go"},

	{id: "X01", says: "the validator of the first proposal passes at its first try, in a task that has just started", test: validate},
	{id: "X02", says: "the validator of the first proposal fails if a task's CPU is a fraction: its own type is an unsigned integer",
		reason: "it is about the validator, not about a server"},
	{id: "X03", says: "the last validator of v2 wants the volume shared-local at /ecs among Volumes", reason: "M32 is that volume"},
}

// validate is the agent's sample application, misc/taskmetadata-validator, check by check, on a task that
// has just started: no sample yet.
func validate(t *testing.T) {
	h := newHost(t, testConfig(), newTask())
	get := func(target string, into any) {
		t.Helper()
		r := h.get(t, addrT, target)
		if r.StatusCode != http.StatusOK {
			t.Fatalf("%s: got status %d", target, r.StatusCode)
		}
		if err := json.Unmarshal([]byte(r.body), into); err != nil {
			t.Fatalf("%s: %v", target, err)
		}
	}
	type limits struct{ CPU, Memory uint }
	type container struct {
		DockerID                         string `json:"DockerId"`
		Name, DockerName, Image, ImageID string
		Ports                            []struct{ ContainerPort, HostPort uint16 }
		Labels                           map[string]string
		DesiredStatus, KnownStatus       string
		ExitCode                         *int
		Limits                           limits
		CreatedAt, StartedAt, FinishedAt *time.Time
		Type                             string
		Networks                         []struct{ NetworkMode string }
	}
	var tk struct {
		Cluster, TaskARN, Family, Revision, DesiredStatus, KnownStatus string
		Containers                                                     []container
		Limits                                                         *limits
		PullStartedAt, PullStoppedAt, ExecutionStoppedAt               *time.Time
	}
	get("/v2/metadata", &tk)     // 1
	if len(tk.Containers) != 2 { // 2
		t.Fatalf("got %d containers, want 2", len(tk.Containers))
	}
	var id string
	for _, c := range tk.Containers { // 3
		if c.Type == "NORMAL" {
			id = c.DockerID
		}
	}
	if id == "" {
		t.Fatal("no NORMAL container with an id")
	}
	get("/v2/metadata/"+id, &container{}) // 4
	type stats struct {
		Read    time.Time `json:"read"`
		PreRead time.Time `json:"preread"`
	}
	get("/v2/stats", &map[string]*stats{}) // 5
	get("/v2/stats/"+id, &stats{})         // 6
}

// limitedHost is a host with a rate limit and a clock of its own.
type limitedHost struct {
	*host
	clock *fakeClock
}

var limitedRate = RateLimit{PerSecond: 2, Burst: 3}

func newLimited(t *testing.T) *limitedHost {
	t.Helper()
	cfg := testConfig()
	cfg.Rate = limitedRate
	clock := &fakeClock{}
	clock.advance(time.Hour)
	h := newStopped(t, cfg, newTask(), newOther())
	h.now = clock.of(h.start)
	h.listen(t)
	return &limitedHost{h, clock}
}

// exhaust asks for a path until the burst is used up, and returns the answer after that.
func (h *limitedHost) exhaust(t *testing.T) reply {
	t.Helper()
	for i := range limitedRate.Burst {
		if r := h.get(t, addrT, "/v2/metadata"); r.StatusCode != 200 {
			t.Fatalf("request %d: got %d", i, r.StatusCode)
		}
	}
	return h.get(t, addrT, "/v2/metadata")
}

const (
	sampleA = `{"read":"2024-01-02T03:04:05Z","id":"` + idA + `"}`
	sampleP = `{"read":"2024-01-02T03:04:05Z","id":"` + idP + `"}`
)

// sampled is T with a sample of each container.
func sampled() *task.Task {
	tk := newTask()
	tk.Containers[0].Stats.Store(&task.Sample{JSON: []byte(sampleA), V2: len(sampleA) - 1})
	tk.Containers[1].Stats.Store(&task.Sample{JSON: []byte(sampleP), V2: len(sampleP) - 1})
	return tk
}

func stop(c *task.Container) {
	code := 0
	c.PID, c.State, c.ExitCode = 0, "exited", &code
	c.KnownStatus = task.StatusStopped
	c.FinishedAt = time.Date(2024, 1, 2, 3, 4, 7, 0, time.UTC)
}

var unknownBody = `"Unable to get task arn from request: unable to associate '` + addrU.String() + `' with task"`

func unknown(t *testing.T, target string) {
	t.Helper()
	h := newHost(t, testConfig(), newTask())
	want(t, h.get(t, addrU, target), 400, typeJSON, unknownBody)
}

// wantNoContainer asks for a container by id, as it stands in the path, and wants to be told that there is no
// such thing, named as shown.
func wantNoContainer(t *testing.T, id, shown string) {
	t.Helper()
	h := newHost(t, testConfig(), newTask(), newOther())
	want(t, h.get(t, addrT, "/v2/metadata/"+id), 400, typeJSON, `"Unable to generate metadata for container '`+shown+`'"`)
}

func moved(t *testing.T, target, location string) {
	t.Helper()
	h := newHost(t, testConfig(), newTask())
	r := h.get(t, addrT, target)
	if got := r.Header.Get("Location"); r.StatusCode != 301 || got != location {
		t.Errorf("%s: got %d to %q, want 301 to %q", target, r.StatusCode, got, location)
	}
	if got := r.Header.Values("X-Rate-Limit-Limit"); got != nil {
		t.Errorf("%s: X-Rate-Limit-Limit: got %q, want none", target, got)
	}
}

// taskOf returns the document that a task with tk's containers and limits is told of itself.
func taskOf(t *testing.T, tk *task.Task) string {
	t.Helper()
	h := newHost(t, testConfig(), tk)
	r := h.get(t, addrT, "/v2/metadata")
	want(t, r, 200, typeJSON, r.body)
	return r.body
}

func containerOf(t *testing.T, c *task.Container) string {
	t.Helper()
	tk := newTask()
	tk.Containers = []*task.Container{c}
	h := newHost(t, testConfig(), tk)
	r := h.get(t, addrT, "/v2/metadata/"+c.ID)
	want(t, r, 200, typeJSON, r.body)
	return r.body
}

type shownContainer struct {
	DockerID                string `json:"DockerId"`
	Name, Type, KnownStatus string
	Networks                json.RawMessage
}

type shownTask struct{ Containers []shownContainer }

func decode(t *testing.T, doc string) (d shownTask) {
	t.Helper()
	if err := json.Unmarshal([]byte(doc), &d); err != nil {
		t.Fatal(err)
	}
	return d
}

var containersMember = regexp.MustCompile(`"Containers":\[.*\]`)

func stripContainers(doc string) string { return containersMember.ReplaceAllString(doc, "") }

// keysOf checks a JSON object's own keys, in order.
func keysOf(t *testing.T, doc string, want ...string) {
	t.Helper()
	dec := json.NewDecoder(strings.NewReader(doc))
	if _, err := dec.Token(); err != nil {
		t.Fatal(err)
	}
	var got []string
	for dec.More() {
		key, err := dec.Token()
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, key.(string))
		var value json.RawMessage
		if err := dec.Decode(&value); err != nil {
			t.Fatal(err)
		}
	}
	if !slices.Equal(got, want) {
		t.Errorf("keys: got %v, want %v", got, want)
	}
}

func want(t *testing.T, r reply, status int, contentType, body string) {
	t.Helper()
	if r.StatusCode != status || r.Header.Get("Content-Type") != contentType || r.body != body {
		t.Errorf("got %d %q %s\nwant %d %q %s", r.StatusCode, r.Header.Get("Content-Type"), r.body, status, contentType, body)
	}
}

func has(t *testing.T, s, part string) {
	t.Helper()
	if !strings.Contains(s, part) {
		t.Errorf("no %s in %s", part, s)
	}
}

func lacks(t *testing.T, s, part string) {
	t.Helper()
	if strings.Contains(s, part) {
		t.Errorf("%s in %s", part, s)
	}
}
