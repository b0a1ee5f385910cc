package server

import (
	"encoding/json"
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
	id string
	// what metad does, in the words of docs/ecs-agent.md; on one line, however long
	says   string
	test   func(t *testing.T)
	file   string
	reason string
}

// rows are all rows, in the order of the page.
var rows = slices.Concat(metadataRows, requestRows)

// metadataRows are the rows about documents: the task's (M), a container's (C), and what an address
// without a task gets (E).
var metadataRows = []row{
	{id: "M01", says: "T's GET /v2/metadata is answered 200, application/json, with T's " +
		"document", test: func(t *testing.T) {
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
		for _, method := range []string{"POST", "PUT", "DELETE", "PATCH", "OPTIONS",
			"BREW"} {
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
	{id: "M06", says: "a task's members are Cluster, TaskARN, Family, Revision, " +
		"DesiredStatus, KnownStatus, Containers, Limits, PullStartedAt, PullStoppedAt, " +
		"ExecutionStoppedAt, AvailabilityZone, in this order", test: func(t *testing.T) {
		tk := newTask()
		tk.Limits = task.TaskLimits{CPU: 1, Memory: 1}
		now := time.Now()
		tk.PullStartedAt, tk.PullStoppedAt, tk.ExecutionStoppedAt = now, now, now
		tk.AvailabilityZone = "us-west-2a"
		keysOf(t, taskOf(t, tk), "Cluster", "TaskARN", "Family", "Revision",
			"DesiredStatus", "KnownStatus", "Containers",
			"Limits", "PullStartedAt", "PullStoppedAt", "ExecutionStoppedAt",
			"AvailabilityZone")
	}},
	{id: "M07", says: "a task without limits has no member Limits", test: func(t *testing.T) { lacks(t, stripContainers(taskOf(t, newTask())), `"Limits"`) }},
	{id: "M08", says: "a task's Limits are its CPU in vCPUs, a fraction if need be, and its " +
		"memory in MiB", test: func(t *testing.T) {
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
	{id: "M10", says: "times are RFC 3339 in UTC, with as many digits of the second's " +
		"fraction as are not zero", test: func(t *testing.T) {
		tk := newTask()
		tk.PullStartedAt = time.Date(2024, 1, 2, 4, 4, 5, 120_000_000,
			time.FixedZone("", 3600))
		tk.PullStoppedAt = time.Date(2024, 1, 2, 2, 4, 5, 0, time.FixedZone("", -3600))
		has(t, taskOf(t, tk), `"PullStartedAt":"2024-01-02T03:04:05.12Z","PullStoppedAt":"2024-01-02T03:04:05Z"`)
	}},
	{id: "M11", says: "a task whose images were not pulled has no pull times", test: func(t *testing.T) { lacks(t, taskOf(t, newTask()), "PullSt") }},
	{id: "M12", says: "both A and P are in Containers, ordered by creation time, then id",
		test: func(t *testing.T) {
			d := decode(t, taskOf(t, newTask()))
			if len(d.Containers) != 2 || d.Containers[0].DockerID != idA ||
				d.Containers[1].DockerID != idP {
				t.Errorf("got %+v", d.Containers)
			}
		}},
	{id: "M13", says: "P is of type CNI_PAUSE, is named ~internal~ecs~pause, and is " +
		"RESOURCES_PROVISIONED when it runs", test: func(t *testing.T) {
		p := decode(t, taskOf(t, newTask())).Containers[1]
		if p.Type != "CNI_PAUSE" || p.Name != "~internal~ecs~pause" ||
			p.KnownStatus != "RESOURCES_PROVISIONED" {
			t.Errorf("got %+v", p)
		}
	}},
	{id: "M14", says: "a task none of whose containers exists has no member Containers",
		test: func(t *testing.T) {
			tk := newTask()
			tk.Containers = nil
			lacks(t, taskOf(t, tk), "Containers")
		}},
	{id: "M15", says: "a container that is being created has an empty DockerId",
		test: func(t *testing.T) {
			tk := newTask()
			tk.Containers = append(tk.Containers, &task.Container{Name: "next",
				KnownStatus: task.StatusNone})
			has(t, taskOf(t, tk), `{"DockerId":"","Name":"next"`)
		}},
	{id: "M16", says: "a container whose image was pulled, and no more, is not listed",
		test: func(t *testing.T) {
			tk := newTask()
			tk.Containers = append(tk.Containers, &task.Container{Name: "next",
				KnownStatus: task.StatusPulled})
			lacks(t, taskOf(t, tk), `"next"`)
		}},
	{id: "M17", says: "a stopped container stays listed, with ExitCode, 0 included, and " +
		"FinishedAt", test: func(t *testing.T) {
		tk := newTask()
		stop(tk.Containers[0])
		doc := taskOf(t, tk)
		has(t, doc, `"KnownStatus":"STOPPED","ExitCode":0,`)
		has(t, doc, `"FinishedAt":"2024-01-02T03:04:07Z"`)
		if n := len(decode(t, doc).Containers); n != 2 {
			t.Errorf("got %d containers, want 2", n)
		}
	}},
	{id: "M18", says: "a running container has neither ExitCode nor FinishedAt",
		test: func(t *testing.T) {
			doc := taskOf(t, newTask())
			lacks(t, doc, "ExitCode")
			lacks(t, doc, "FinishedAt")
		}},
	{id: "M19", says: "a container's members are DockerId, Name, DockerName, Image, " +
		"ImageID, Ports, Labels, DesiredStatus, KnownStatus, ExitCode, Limits, " +
		"CreatedAt, StartedAt, FinishedAt, Type, Networks, Health, Volumes, in this order",
		test: func(t *testing.T) {
			c := running(idA, "app")
			stop(c)
			c.Ports = []task.Port{{ContainerPort: 80, Protocol: "tcp", HostPort: 80}}
			c.Health = &task.Health{}
			c.Volumes = []task.Volume{{Source: "/a", Destination: "/b"}}
			keysOf(t, containerOf(t, c), "DockerId", "Name", "DockerName", "Image",
				"ImageID", "Ports", "Labels", "DesiredStatus",
				"KnownStatus", "ExitCode", "Limits", "CreatedAt", "StartedAt",
				"FinishedAt", "Type", "Networks", "Health", "Volumes")
		}},
	{id: "M20", says: "a container without CPU units shows 2, the least that Linux grants; " +
		"the 2017 agent showed 0", test: func(t *testing.T) {
		c := running(idA, "app")
		c.Limits = task.ContainerLimits{CPU: 0, Memory: 50}
		has(t, containerOf(t, c), `"Limits":{"CPU":2,"Memory":50}`)
	}},
	{id: "M21", says: "a container's CPU units are written as an integer", test: func(t *testing.T) { has(t, containerOf(t, running(idA, "app")), `"CPU":10,`) }},
	{id: "M22", says: "DockerName has no leading slash", test: func(t *testing.T) { has(t, containerOf(t, running(idA, "app")), `"DockerName":"ecs-web-7-app-`) }},
	{id: "M23", says: "every container of an awsvpc task, P included, has one network: " +
		"awsvpc, with the addresses of the task's network interface",
		test: func(t *testing.T) {
			for _, c := range decode(t, taskOf(t, newTask())).Containers {
				if got := string(
					c.Networks); got != `[{"NetworkMode":"awsvpc","IPv4Addresses":["192.0.2.3"]}]` {
					t.Errorf("%s: got %s", c.Name, got)
				}
			}
		}},
	{id: "M24", says: "an interface without IPv6 gives no member IPv6Addresses", test: func(t *testing.T) { lacks(t, taskOf(t, newTask()), "IPv6Addresses") }},
	{id: "M25", says: "in a task with a network interface, HostPort is ContainerPort",
		test: func(t *testing.T) {
			c := running(idA, "app")
			c.Ports = []task.Port{{ContainerPort: 80, Protocol: "tcp", HostPort: 8080}}
			has(t, containerOf(t, c), `"Ports":[{"ContainerPort":80,"Protocol":"tcp","HostPort":80}]`)
		}},
	{id: "M26", says: "Ports are the bindings that Docker reports; the 2017 agent took them from the task definition", file: "pkg/docker/describe_test.go"},
	{id: "M27", says: "Labels are sorted by key, the five of ECS among them",
		test: func(t *testing.T) {
			var c struct{ Labels json.RawMessage }
			if err := json.Unmarshal([]byte(containerOf(t, running(idA, "app"))),
				&c); err != nil {
				t.Fatal(err)
			}
			keysOf(t, string(c.Labels), "com.amazonaws.ecs.cluster",
				"com.amazonaws.ecs.container-name", "com.amazonaws.ecs.task-arn",
				"com.amazonaws.ecs.task-definition-family",
				"com.amazonaws.ecs.task-definition-version")
		}},
	{id: "M28", says: "<, > and & in a string are written as \\u003c, \\u003e and \\u0026",
		test: func(t *testing.T) {
			c := running(idA, "app")
			c.Labels = map[string]string{"k": "<a>&"}
			has(t, containerOf(t, c), `"Labels":{"k":"\u003ca\u003e\u0026"}`)
		}},
	{id: "M29", says: "a container whose health check has not spoken yet has an empty Health",
		test: func(t *testing.T) {
			c := running(idA, "app")
			c.Health = &task.Health{}
			has(t, containerOf(t, c), `"Health":{}`)
		}},
	{id: "M30", says: "a healthy container shows status, statusSince and output, and no " +
		"exitCode", test: func(t *testing.T) {
		c := running(idA, "app")
		c.Health = &task.Health{Status: "HEALTHY", Since: c.StartedAt, Output: "hello\n"}
		has(t, containerOf(t, c), `"Health":{"status":"HEALTHY","statusSince":"2024-01-02T03:04:06Z","output":"hello\n"}`)
	}},
	{id: "M31", says: "a container without a health check has no Health", test: func(t *testing.T) { lacks(t, containerOf(t, running(idA, "app")), "Health") }},
	{id: "M32", says: "Volumes are Docker's mounts: DockerName, Source, Destination",
		test: func(t *testing.T) {
			c := running(idA, "app")
			c.Volumes = []task.Volume{{DockerName: "shared-local",
				Source:      "/var/lib/docker/volumes/shared-local/_data",
				Destination: "/ecs"}}
			has(t, containerOf(t, c), `"Volumes":[{"DockerName":"shared-local","Source":"/var/lib/docker/volumes/shared-local/_data","Destination":"/ecs"}]`)
		}},
	{id: "M33", says: "without a zone there is no member AvailabilityZone", test: func(t *testing.T) { lacks(t, taskOf(t, newTask()), "AvailabilityZone") }},
	{id: "M34", says: "LogDriver, LogOptions, ContainerARN, LaunchType, Errors and HostIp " +
		"are never in a v2 document", test: func(t *testing.T) {
		tk := newTask()
		tk.ContainerInstanceARN = "arn:ci"
		tk.Containers[0].Ports = []task.Port{{ContainerPort: 80, HostIP: "0.0.0.0"}}
		for _, key := range []string{"LogDriver", "LogOptions", "ContainerARN",
			"LaunchType", "Errors", "HostIp", "ContainerInstanceARN"} {
			lacks(t, taskOf(t, tk), key)
		}
	}},

	{id: "C01", says: "/v2/metadata/<id of A> is A's element of the task's document",
		test: func(t *testing.T) {
			h := newHost(t, testConfig(), newTask())
			r := h.get(t, addrT, "/v2/metadata/"+idA)
			var doc struct{ Containers []json.RawMessage }
			if err := json.Unmarshal([]byte(h.get(t, addrT, "/v2/metadata").body),
				&doc); err != nil {
				t.Fatal(err)
			}
			want(t, r, 200, typeJSON, string(doc.Containers[0]))
		}},
	{id: "C02", says: "P can be asked for too", test: func(t *testing.T) {
		h := newHost(t, testConfig(), newTask())
		want(t, h.get(t, addrT, "/v2/metadata/"+idP), 200, typeJSON, containerDocument(task.V2, pause()))
	}},
	{id: "C03", says: "a query after a container's id changes nothing; for the 2017 agent " +
		"it was part of the id", test: func(t *testing.T) {
		h := newHost(t, testConfig(), newTask())
		want(t, h.get(t, addrT, "/v2/metadata/"+idA+"?x=1"), 200, typeJSON, containerDocument(task.V2, running(idA, "app")))
	}},
	{id: "C04", says: "a slash after an id is part of the id, so there is no such container", test: func(t *testing.T) { wantNoContainer(t, idA+"/", idA+"/") }},
	{id: "C05", says: "the first 12 characters of an id name no container", test: func(t *testing.T) { wantNoContainer(t, idA[:12], idA[:12]) }},
	{id: "C06", says: "an unknown id is answered 400, with the id in the text", test: func(t *testing.T) { wantNoContainer(t, "nope", "nope") }},
	{id: "C07", says: "an id may hold slashes, plain or escaped, and the text shows them plain",
		test: func(t *testing.T) {
			wantNoContainer(t, "a/b", "a/b")
			wantNoContainer(t, "a%2Fb", "a/b")
		}},
	{id: "C08", says: "the id in the text is escaped as any string of JSON",
		test: func(t *testing.T) {
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
	{id: "E02", says: "U gets the same text on every v2 path, whatever id it asks for",
		test: func(t *testing.T) {
			for _, target := range []string{"/v2/metadata/" + idA, "/v2/stats",
				"/v2/stats/" + idA, "/v2/metadataWithTags"} {
				unknown(t, target)
			}
		}},
	// an older agent's text, which ours is not
	{id: "E03", says: "the text has no \"v2 handler\", which the 2017 agent's had",
		test: func(t *testing.T) {
			h := newHost(t, testConfig(), newTask())
			lacks(t, h.get(t, addrU, "/v2/metadata").body, "v2 handler")
		}},
	// a source that never becomes a task waits, and then is told the same
	{id: "E04", says: "processes of the host are no better known than U; a container is its " +
		"task, by its address or, on the host's network, by its cgroup",
		test: func(t *testing.T) {
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
	{id: "E06", says: "after the task is gone, a connection it left is answered 400, with " +
		"the ARN in the text", test: func(t *testing.T) {
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
			if got := string(c.get(request(target))); !strings.HasPrefix(got,
				"HTTP/1.1 400 ") || !strings.HasSuffix(got, "\r\n\r\n"+text) {
				t.Errorf("%s: got %s", target, got)
			}
		}
		h.cfg.UnknownWait = 0
		// Somebody new at the address was never anybody.
		want(t, h.get(t, addrT, "/v2/metadata"), 400, typeJSON, strings.ReplaceAll(unknownBody, addrU.String(), addrT.String()))
	}},
	{id: "E07", says: "an address that has passed to another task gets that task's document",
		test: func(t *testing.T) {
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
}
