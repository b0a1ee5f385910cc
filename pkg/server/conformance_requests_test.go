package server

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"metad/pkg/task"
)

// requestRows are the rows about statistics (S), routes (R), headers (H), limits (L), documents
// with tags (W), credentials (K), the network (N), v3 and v4 (V), the metadata file (F), and the
// validators (X).
var requestRows = []row{
	{id: "S01", says: "/v2/stats is an object whose keys are the full ids of A and P",
		test: func(t *testing.T) {
			h := newHost(t, testConfig(), sampled())
			want(t, h.get(t, addrT, "/v2/stats"), 200, typeJSON, `{"`+idA+`":`+sampleA+`,"`+idP+`":`+sampleP+`}`)
		}},
	{id: "S02", says: "/v2/stats/ is the same as /v2/stats", test: func(t *testing.T) {
		h := newHost(t, testConfig(), sampled())
		want(t, h.get(t, addrT, "/v2/stats/"), 200, typeJSON, `{"`+idA+`":`+sampleA+`,"`+idP+`":`+sampleP+`}`)
	}},
	{id: "S03", says: "/v2/stats/<id of A> is A's last sample in Docker's form; " +
		"?stream=true goes on with each new one", test: func(t *testing.T) {
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
	{id: "S05", says: "a container without a sample is null, also before its start is known",
		test: func(t *testing.T) {
			tk := newTask()
			h := newHost(t, testConfig(), tk)
			want(t, h.get(t, addrT, "/v2/stats/"+idA), 200, typeJSON, "null")
			if d := time.Since(time.Unix(0, tk.Containers[0].Stats.Asked())); d < 0 ||
				d > time.Minute {
				t.Errorf("asked %v ago, want just now", d)
			}
			// Departure: nor is it known that A was started. Who else would ask for it?
			created := newTask()
			created.Containers[0].PID, created.Containers[0].State,
				created.Containers[0].KnownStatus = 0, "created", task.StatusCreated
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
	{id: "S06", says: "in a task's statistics a container without a sample is null too",
		test: func(t *testing.T) {
			tk := sampled()
			tk.Containers[0].Stats.Store(nil)
			h := newHost(t, testConfig(), tk)
			want(t, h.get(t, addrT, "/v2/stats"), 200, typeJSON, `{"`+idA+`":null,"`+idP+`":`+sampleP+`}`)
		}},
	{id: "S07", says: "a stopped container's statistics are answered 400, with its id in " +
		"the text", test: func(t *testing.T) {
		tk := sampled()
		stop(tk.Containers[0]) // the last sample may still be in the cell
		h := newHost(t, testConfig(), tk)
		want(t, h.get(t, addrT, "/v2/stats/"+idA), 400, typeJSON, `"Unable to get container stats for: `+idA+`"`)
	}},
	{id: "S08", says: "in a task's statistics a stopped container is null",
		test: func(t *testing.T) {
			tk := sampled()
			stop(tk.Containers[0])
			h := newHost(t, testConfig(), tk)
			want(t, h.get(t, addrT, "/v2/stats"), 200, typeJSON, `{"`+idA+`":null,"`+idP+`":`+sampleP+`}`)
		}},
	{id: "S09", says: "B's statistics are not for T: 400", test: func(t *testing.T) {
		h := newHost(t, testConfig(), sampled(), newOther())
		want(t, h.get(t, addrT, "/v2/stats/"+idB), 400, typeJSON, `"Unable to get container stats for: `+idB+`"`)
	}},
	{id: "S10", says: "the statistics of an unknown id are answered 400, with the id in the " +
		"text", test: func(t *testing.T) {
		h := newHost(t, testConfig(), sampled())
		want(t, h.get(t, addrT, "/v2/stats/n%6Fpe"), 400, typeJSON, `"Unable to get container stats for: nope"`)
	}},
	{id: "S11", says: "a task with no container left has empty statistics",
		test: func(t *testing.T) {
			tk := newTask()
			tk.Containers = []*task.Container{}
			h := newHost(t, testConfig(), tk)
			want(t, h.get(t, addrT, "/v2/stats"), 200, typeJSON, "{}")
		}},
	{id: "S12", says: "a task whose containers are not known at all has none: 400, with the " +
		"ARN in the text", test: func(t *testing.T) {
		tk := newTask()
		tk.Containers = nil
		h := newHost(t, testConfig(), tk)
		want(t, h.get(t, addrT, "/v2/stats"), 400, typeJSON, `"Unable to get task stats for: `+arnT+`"`)
	}},
	{id: "S13", says: "a sample that is all zeros has the members that Docker never leaves out, and no other", file: "pkg/stats/parse_test.go"},
	{id: "S14", says: "a sample ends in name, id and networks; the 2017 agent dropped the first two", file: "pkg/stats/tree_test.go"},
	{id: "S15", says: "all containers of an awsvpc task have the counters of the task's eth0, and none of ecs-eth0", file: "pkg/stats/tree_test.go"},
	// P's sample, which has the task's network counters, is there; A's is not
	{id: "S16", says: "a container without a sample is null even if its task's network " +
		"counters are there", test: func(t *testing.T) {
		tk := sampled()
		tk.Containers[0].Stats.Store(nil)
		h := newHost(t, testConfig(), tk)
		want(t, h.get(t, addrT, "/v2/stats/"+idA), 200, typeJSON, "null")
	}},
	{id: "S17", says: "a sample is about a second old at most", file: "pkg/stats/sampler_test.go"},
	{id: "S18", says: "counters are cumulative integers that never fall while the container runs", file: "pkg/stats/tree_test.go"},

	{id: "R01", says: "a path that does not exist is answered 404 in plain text; paths are " +
		"case-sensitive", test: func(t *testing.T) {
		h := newHost(t, testConfig(), newTask())
		for _, target := range []string{"/", "/v2", "/v2/", "/v2/meta", "/v2/METADATA",
			"/nope", "/v2/statss", "/v2/metadataWithTags/x"} {
			r := h.get(t, addrT, target)
			want(t, r, 404, typeText, "404 page not found\n")
			if got := r.Header.Get("X-Content-Type-Options"); got != "nosniff" {
				t.Errorf("X-Content-Type-Options: got %q", got)
			}
		}
	}},
	{id: "R02", says: "a doubled slash is answered 301 to the clean path, without " +
		"rate-limit headers", test: func(t *testing.T) {
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
	{id: "R06", says: "an id with a line feed is a path that does not exist",
		test: func(t *testing.T) {
			h := newHost(t, testConfig(), newTask())
			r := h.get(t, addrT, "/v2/metadata/%0Ax")
			want(t, r, 404, typeText, "404 page not found\n")
			if got := r.Header.Values("X-Rate-Limit-Limit"); got != nil {
				t.Errorf("X-Rate-Limit-Limit: got %q, want none", got)
			}
		}},
	{id: "R07", says: "a redirect has no body and no type; the 2017 agent's had a line of HTML",
		test: func(t *testing.T) {
			h := newHost(t, testConfig(), newTask())
			r := h.get(t, addrT, "//v2/metadata")
			want(t, r, 301, "", "")
			if _, ok := r.Header["Content-Type"]; ok || r.ContentLength != 0 {
				t.Errorf("got %v", r.Header)
			}
		}},

	{id: "H01", says: "every answer but a redirect has four rate-limit headers, an empty " +
		"Forwarded-For among them", test: func(t *testing.T) {
		h := newHost(t, testConfig(), newTask())
		for target, status := range map[string]int{"/v2/metadata": 200,
			"/v2/metadata/nope": 400, "/nope": 404} {
			c := h.dial(t, addrT)
			fmt.Fprintf(c, "GET %s HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
				target)
			raw := readAll(t, c)
			has(t, raw, fmt.Sprintf("HTTP/1.1 %d ", status))
			for _, line := range []string{"X-Rate-Limit-Limit: 40.00",
				"X-Rate-Limit-Duration: 1",
				"X-Rate-Limit-Request-Forwarded-For: ", "X-Rate-Limit-Request-Remote-Addr: " + c.LocalAddr().String()} {
				has(t, raw, "\r\n"+line+"\r\n")
			}
			has(t, raw, "\r\nDate: ")
			lacks(t, raw, "\r\nServer:")
		}
	}},
	{id: "H02", says: "X-Rate-Limit-Limit is the limit with two decimals, and the agent's " +
		"default without a limit", test: func(t *testing.T) {
		cfg := testConfig()
		cfg.Rate = RateLimit{100, 150}
		h := newHost(t, cfg, newTask())
		if got := h.get(t, addrT, "/v2/metadata").Header.Get(
			"X-Rate-Limit-Limit"); got != "100.00" {
			t.Errorf("got %q", got)
		}
	}},
	{id: "H03", says: "the request's X-Forwarded-For comes back in " +
		"X-Rate-Limit-Request-Forwarded-For", test: func(t *testing.T) {
		h := newHost(t, testConfig(), newTask())
		if got := h.get(t, addrT, "/v2/metadata", "x-forwarded-for: a").Header.Get(
			"X-Rate-Limit-Request-Forwarded-For"); got != "a" {
			t.Errorf("got %q", got)
		}
	}},
	{id: "H04", says: "JSON is application/json without a charset, and no line feed follows it",
		test: func(t *testing.T) {
			h := newHost(t, testConfig(), sampled())
			for _, target := range []string{"/v2/metadata", "/v2/metadata/" + idA,
				"/v2/stats", "/v2/stats/" + idA, "/v2/metadata/x", "/v2/stats/x"} {
				r := h.get(t, addrT, target)
				if got := r.Header.Values("Content-Type"); !slices.Equal(got,
					[]string{"application/json"}) ||
					strings.HasSuffix(r.body, "\n") {
					t.Errorf("%s: got %q, %q", target, got, r.body)
				}
				if len(r.TransferEncoding) > 0 ||
					r.ContentLength != int64(len(r.body)) {
					t.Errorf("%s: got Content-Length %d, want %d", target,
						r.ContentLength, len(r.body))
				}
			}
		}},

	{id: "L01", says: "a request beyond the burst is answered 429 in plain text",
		test: func(t *testing.T) {
			h := newLimited(t)
			r := h.exhaust(t)
			want(t, r, 429, typeText, "You have reached maximum request limit.")
		}},
	// departure: a task's paths share its bucket
	{id: "L02", says: "all paths of a task share one limit", test: func(t *testing.T) {
		h := newLimited(t)
		h.exhaust(t)
		want(t, h.get(t, addrT, "/v2/stats"), 429, typeText, "You have reached maximum request limit.")
	}},
	{id: "L03", says: "another task is not limited with it", test: func(t *testing.T) {
		h := newLimited(t)
		h.exhaust(t)
		want(t, h.get(t, addrB, "/v2/metadata"), 200, typeJSON, taskDocument(task.V2, newOther()))
	}},
	{id: "L04", says: "another query or method counts towards the same limit",
		test: func(t *testing.T) {
			h := newLimited(t)
			h.exhaust(t)
			want(t, h.get(t, addrT, "/v2/metadata?x=1"), 429, typeText, "You have reached maximum request limit.")
			want(t, h.do(t, addrT, "POST", "/v2/metadata"), 429, typeText, "You have reached maximum request limit.")
		}},
	// departure, as L02
	{id: "L05", says: "/v2/metadata and /v2/metadata/ share one limit",
		test: func(t *testing.T) {
			h := newLimited(t)
			h.exhaust(t)
			want(t, h.get(t, addrT, "/v2/metadata/"), 429, typeText, "You have reached maximum request limit.")
		}},
	{id: "L06", says: "a path that does not exist counts too, unless it is passed to the " +
		"agent, whose limit it meets", test: func(t *testing.T) {
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
	{id: "L08", says: "a second later as many requests pass as the rate says",
		test: func(t *testing.T) {
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
	{id: "L09", says: "ECS_TASK_METADATA_RPS_LIMIT is \"rate,burst\"; anything else means " +
		"40,60", test: func(t *testing.T) {
		f := func(text string, want RateLimit) {
			t.Helper()
			good := want != RateLimit{40, 60}
			if got, ok := ParseRateLimit(text); got != want || ok != good {
				t.Errorf("%q: got %v %v, want %v %v", text, got, ok, want, good)
			}
		}
		f("100,150", RateLimit{100, 150})
		f(" 100 , 150 ", RateLimit{100, 150})
		for _, text := range []string{"x", "0,5", "5", "5,0", "-1,5", "1,2,3", ",", "1.5,2",
			"99999999999999999999,1"} {
			f(text, RateLimit{40, 60})
		}
		f("", RateLimit{})
	}},
	{id: "L10", says: "a 429 has the rate-limit headers and a Retry-After",
		test: func(t *testing.T) {
			h := newLimited(t)
			r := h.exhaust(t)
			for _, name := range []string{"X-Rate-Limit-Limit", "X-Rate-Limit-Duration",
				"X-Rate-Limit-Request-Forwarded-For", "X-Rate-Limit-Request-Remote-Addr"} {
				if len(r.Header.Values(name)) != 1 {
					t.Errorf("%s: got %q", name, r.Header.Values(name))
				}
			}
			if got := r.Header.Get("Retry-After"); got != "1" { // departure
				t.Errorf("Retry-After: got %q, want 1", got)
			}
		}},

	{id: "W01", says: "/v2/metadataWithTags adds the tags of the task and of the container " +
		"instance", test: func(t *testing.T) {
		a := newAgent(t)
		tk := newTask()
		tk.Containers[0].EndpointID = endpointA
		h := newHost(t, a.config(), tk)
		for _, target := range []string{"/v2/metadataWithTags", "/v2/metadataWithTags/",
			"/v2/metadata/taskWithTags"} {
			r := h.get(t, addrT, target)
			want(t, r, 200, typeJSON, taggedT)
			has(t, r.body, `"TaskTags":{`)
			has(t, r.body, `"ContainerInstanceTags":{`)
		}
	}},
	{id: "W02", says: "if the tags cannot be had, the document comes without them, 200",
		test: func(t *testing.T) {
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

	{id: "K01", says: "credentials without an id: 400, NoIdInRequest",
		test: func(t *testing.T) {
			h := newHost(t, newAgent(t).config(), newTask())
			body := `{"code":"NoIdInRequest","message":"CredentialsV2Request: No Credential ID in the request","HTTPErrorCode":400}`
			want(t, h.get(t, addrT, "/v2/credentials/"), 400, typeJSON, body)
			want(t, h.get(t, addrT, "/v1/credentials"), 400, typeJSON, body)
		}},
	{id: "K02", says: "credentials with an unknown id: 400, InvalidIdInRequest",
		test: func(t *testing.T) {
			h := newHost(t, newAgent(t).config(), newTask())
			body := `{"code":"InvalidIdInRequest","message":"CredentialsV2Request: Credentials not found","HTTPErrorCode":400}`
			want(t, h.get(t, addrT, "/v2/credentials/unknown"), 400, typeJSON, body)
			want(t, h.get(t, addrT, "/v1/credentials?id=unknown"), 400, typeJSON, body)
		}},
	// from any source: the id in the path is the proof
	{id: "K03", says: "credentials are given to anyone with the id, from whatever address",
		test: func(t *testing.T) {
			a := newAgent(t)
			h := newHost(t, a.config(), newTask())
			want(t, h.get(t, addrT, "/v2/credentials/"+credentialsID), 200, typeJSON, credentials)
			want(t, h.get(t, addrU, "/v1/credentials?id="+credentialsID), 200, typeJSON, credentials)
			a.got(t, "GET /v1/credentials?id="+credentialsID+" HTTP/1.1")
		}},
	{id: "K04", says: "the agent's own API is at /api/<endpoint id>; a wrong method is " +
		"answered 405 without a body", test: func(t *testing.T) {
		a := newAgent(t)
		h := newHost(t, a.config(), newTask())
		want(t, h.get(t, addrT, "/api/e/task-protection/v1/state"), 200, typeJSON, `{"protection":{}}`)
		want(t, h.send(t, addrT,
			"PUT /api/e/task-protection/v1/state HTTP/1.1\r\nHost: "+
				"x\r\nContent-Length: 26\r\n\r\n{\"ProtectionEnabled\":true}"),
			200, typeJSON, `{"protection":{"ProtectionEnabled":true}}`)
		r := h.do(t, addrT, "DELETE", "/api/e/task-protection/v1/state")
		want(t, r, 405, "", "")
	}},

	{id: "N01", says: "an awsvpc task has ecs-eth0 with an address of 169.254.172.0/22, and routes to 169.254.170.2 and its gateway alone", file: "internal/testdocker/testdocker_root_test.go"},
	{id: "N02", says: "the server sees the task's own address", file: "internal/testdocker/testdocker_root_test.go"},
	// two tasks are two addresses; who shares an address is one task
	{id: "N03", says: "two tasks have two addresses; the containers of one task share one",
		test: func(t *testing.T) {
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
	{id: "X02", says: "the validator of the first proposal fails if a task's CPU is a " +
		"fraction: its own type is an unsigned integer",
		reason: "it is about the validator, not about a server"},
	{id: "X03", says: "the last validator of v2 wants the volume shared-local at /ecs among Volumes", reason: "M32 is that volume"},
}
