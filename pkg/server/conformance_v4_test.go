package server

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"metad/pkg/task"
)

// The rows V of docs/ecs-agent.md, and what metad adds to the agent's v3 and v4: the kernel's
// proof, names, the host's view.

const (
	idW = "1111111111111111111111111111111111111111111111111111111111111111"
	idD = "2222222222222222222222222222222222222222222222222222222222222222"

	// metad's own form
	endpointW = "99999999999999999999999999999999-11111111111111111111111111111111"
	endpointD = "99999999999999999999999999999999-22222222222222222222222222222222"

	arnShop = "arn:aws:ecs:us-west-2:111122223333:task/default/99999999999999999999999999999999"
)

var (
	addrW = netip.MustParseAddr("127.1.0.4")
	addrD = netip.MustParseAddr("127.1.0.5")
)

// v4Sample is a sample as the sampler stores it: the v2 form is a prefix of the v4 form.
func v4Sample(id string) *task.Sample {
	v2 := `{"read":"2024-01-02T03:04:05Z","id":"` + id + `"`
	return &task.Sample{
		JSON: []byte(
			v2 + `,"network_rate_stats":{"rx_bytes_per_sec":1,"tx_bytes_per_sec":2.5}}`), V2: len(v2)}
}

// newAwsvpc is T with the agent's endpoint id, and a sample of A but none of P.
func newAwsvpc() *task.Task {
	tk := newTask()
	a := tk.Containers[0]
	a.EndpointID, a.NetworkMode = endpointA, "container:"+idP
	a.Stats.Store(v4Sample(idA))
	tk.Endpoints[0].Container = idP
	return tk
}

// newShop is a task on a Docker network whose two containers have addresses and ids of their own,
// with a sample of one.
func newShop() *task.Task {
	web, db := running(idW, "web"), running(idD, "db")
	for i, c := range []*task.Container{web, db} {
		c.DockerName = "shop-" + c.Name + "-1"
		c.Networks = nil
		c.NetworkMode = "shop_default"
		c.DockerNetworks = []task.DockerNetwork{{Name: "shop_default",
			IPAddress: fmt.Sprintf("127.1.0.%d", 4+i)}}
	}
	web.EndpointID, db.EndpointID = endpointW, endpointD
	web.Stats.Store(v4Sample(idW))
	return &task.Task{
		ID: "99999999999999999999999999999999", ARN: arnShop, Cluster: "default",
		Family: "shop", Revision: "1",
		DesiredStatus: task.StatusRunning, KnownStatus: task.StatusRunning,
		Containers: []*task.Container{web, db},
		Endpoints: []task.Endpoint{
			{Addr: addrW, Ifindex: 14, Container: idW},
			{Addr: addrD, Ifindex: 15, Container: idD},
		},
	}
}

// shopDocument is the document of one of newShop's containers.
func shopDocument(v task.Version, i int) string {
	_, each := task.Render(newShop())
	return each[i][v].String()
}

func newV4Host(t *testing.T, change ...func(*Config)) *host {
	t.Helper()
	cfg := testConfig()
	for _, f := range change {
		f(&cfg)
	}
	return newHost(t, cfg, newAwsvpc(), newOther(), newShop())
}

// wantText checks for the agent's way of telling an error: a JSON string.
func wantText(t *testing.T, r reply, status int, text string) {
	t.Helper()
	want(t, r, status, typeJSON, `"`+text+`"`)
}

func testV01(t *testing.T) {
	h := newV4Host(t)
	for _, from := range []netip.Addr{addrT, addrB, addrU} {
		r := h.get(t, from, "/v3/"+endpointA)
		_, each := task.Render(newAwsvpc())
		want(t, r, 200, typeJSON, each[0][task.V3].String())
	}
	want(t, h.get(t, addrU, "/v3/"+endpointW+"?x=1"), 200, typeJSON, shopDocument(task.V3, 0))
	want(t, h.do(t, addrU, "PATCH", "/v3/"+endpointW), 200, typeJSON, shopDocument(task.V3, 0))
}

func testV02(t *testing.T) {
	h := newV4Host(t)
	v2 := func(id string) string { s := v4Sample(id); return string(s.JSON[:s.V2]) + "}" }
	want(t, h.get(t, addrU, "/v3/"+endpointA+"/task"), 200, typeJSON, taskDocument(task.V3, newAwsvpc()))
	want(t, h.get(t, addrU, "/v3/"+endpointA+"/stats"), 200, typeJSON, v2(idA))
	want(t, h.get(t, addrU, "/v3/"+endpointA+"/task/stats"), 200, typeJSON, `{"`+idA+`":`+v2(idA)+`,"`+idP+`":null}`)
	want(t, h.get(t, addrU, "/v3/"+endpointD+"/stats"), 200, typeJSON, "null")
}

const (
	v3Container = "V3 container metadata handler: unable to get container ID from request: " +
		"unable to get docker ID from v3 endpoint ID: "
	v3Task = "V3 task metadata handler: unable to get task arn from request: unable to get " +
		"task Arn from v3 endpoint ID: "
)

func testV03(t *testing.T) {
	h := newV4Host(t)
	wantText(t, h.get(t, addrT, "/v3/bad"), 500, v3Container+"bad")
	wantText(t, h.get(t, addrT, "/v3/"), 500, v3Container)
	wantText(t, h.get(t, addrT, "/v3/b%3Cd"), 500, v3Container+`b\u003cd`)
	for _, form := range []string{"/task", "/taskWithTags"} {
		wantText(t, h.get(t, addrT, "/v3/bad"+form), 500, v3Task+"bad")
	}
}

func testV04(t *testing.T) {
	h := newV4Host(t)
	wantText(t, h.get(t, addrT, "/v3/bad/stats"), 400, strings.Replace(v3Task, "task metadata", "container stats", 1)+"bad")
	wantText(t, h.get(t, addrT, "/v3/bad/task/stats"), 400, strings.Replace(v3Task, "task metadata", "task stats", 1)+"bad")
}

func testV05(t *testing.T) {
	h := newV4Host(t)
	for _, version := range []string{"/v3/", "/v4/"} {
		for _, form := range []string{"/", "/task/", "/task/stats/", "/stats/",
			"/taskWithTags/", "/wrong"} {
			want(t, h.get(t, addrT, version+endpointA+form), 404, typeText, "404 page not found\n")
		}
	}
	for _, path := range []string{"/v3/self/", "/v4/task/", "/v4/containers/app/",
		"/v4/containers/", "/v4/containers//task", "/v5/x", "/v45", "/V4"} {
		r := h.get(t, addrT, path)
		if r.StatusCode != 404 && r.StatusCode != 301 ||
			r.Header.Get("Content-Type") == typeJSON {
			t.Errorf("%s: got %d %s", path, r.StatusCode, r.body)
		}
	}
}

func testV06(t *testing.T) {
	h := newV4Host(t)
	for _, from := range []netip.Addr{addrW, addrU} {
		r := h.get(t, from, "/v4/"+endpointW)
		want(t, r, 200, typeJSON, shopDocument(task.V4, 0))
		has(t, r.body, `,"Networks":[{"NetworkMode":"shop_default","IPv4Addresses":["127.1.0.4"]`) // the rest of it: pkg/task
	}
}

func testV07(t *testing.T) {
	h := newV4Host(t)
	r := h.get(t, addrU, "/v4/"+endpointA+"/task")
	want(t, r, 200, typeJSON, taskDocument(task.V4, newAwsvpc()))
	has(t, r.body, `"FaultInjectionEnabled":false`)
}

func testV08(t *testing.T) {
	h := newV4Host(t)
	v4 := func(s string) string { return strings.Replace(s, "V3", "V4", 1) }
	for _, id := range []string{"bad", "", endpointW[:20], "containers"} {
		wantText(t, h.get(t, addrT, "/v4/"+id), 404, v4(v3Container)+id)
	}
	for form, handler := range map[string]string{"/task": "task metadata",
		"/taskWithTags": "task metadata", "/stats": "container stats", "/task/stats": "task stats"} {
		wantText(t, h.get(t, addrT, "/v4/bad"+form), 404, v4(strings.Replace(v3Task, "task metadata", handler, 1))+"bad")
	}
}

func testV09(t *testing.T) {
	h := newV4Host(t)
	want(t, h.get(t, addrU, "/v4/"+endpointA+"/stats"), 200, typeJSON, string(v4Sample(idA).JSON)) // what is in it: pkg/stats
}

func testV10(t *testing.T) {
	h := newV4Host(t)
	want(t, h.get(t, addrU, "/v4/"+endpointD+"/stats"), 200, typeJSON, "{}")
	want(t, h.get(t, addrU, "/v4/"+endpointD+"/task/stats"), 200, typeJSON, `{"`+idW+`":`+string(v4Sample(idW).JSON)+`,"`+idD+`":{}}`)
}

func testV11(t *testing.T) {
	h := newV4Host(t) // no agent
	for _, version := range []string{"/v3/", "/v4/"} {
		r := h.get(t, addrU, version+endpointW+"/taskWithTags")
		if r.StatusCode != 200 {
			t.Errorf("got %d %s", r.StatusCode, r.body)
		}
		lacks(t, r.body, `"Errors"`)
		want(t, r, 200, typeJSON, h.get(t, addrU, version+endpointW+"/task").body)
	}
}

func testV12(t *testing.T) {
	h := newV4Host(t)
	for _, form := range []string{"/networks", "/tasks", "/tasks/stats", "/tasks/"} {
		for _, who := range []string{endpointW, "self", "containers/web"} {
			want(t, h.get(t, addrW, "/v4/"+who+form), 404, typeText, "404 page not found\n")
		}
	}
}

func testV13(t *testing.T) {
	h := newV4Host(t)
	for _, version := range []string{"/v3/", "/v4/"} {
		has(t, h.get(t, addrU, version+endpointD).body, `"Networks":[{"NetworkMode":"shop_default","IPv4Addresses":["127.1.0.5"]`)
	}
}

// A stopped container that is asked for by its name has a document and no statistics.
func TestV4Stopped(t *testing.T) {
	tk := newShop()
	stop(tk.Containers[1])
	h := newHost(t, testConfig(), tk)
	has(t, h.get(t, addrW, "/v4/containers/db").body, `"KnownStatus":"STOPPED"`)
	wantText(t, h.get(t, addrW, "/v3/containers/db/stats"), 400, "Unable to get container stats for: "+idD)
	wantText(t, h.get(t, addrW, "/v4/containers/db/stats"), 500, "Unable to get container stats for: "+idD)
	has(t, h.get(t, addrW, "/v4/containers/db/task/stats").body, `"`+idD+`":{}`)
	// Its endpoint id is nobody's any more.
	if r := h.get(t, addrW, "/v4/"+endpointD); r.StatusCode != 404 {
		t.Errorf("got %d %s", r.StatusCode, r.body)
	}
}

// Without statistics, and for a task without containers, v4's error is the server's where v3's is
// the client's.
func TestV4NoStats(t *testing.T) {
	h := newV4Host(t, func(c *Config) { c.NoStats = true })
	wantText(t, h.get(t, addrW, "/v3/stats"), 400, "Unable to get container stats for: "+idW)
	wantText(t, h.get(t, addrW, "/v4/stats"), 500, "Unable to get container stats for: "+idW)
	want(t, h.get(t, addrW, "/v4/task/stats"), 200, typeJSON, `{"`+idW+`":{},"`+idD+`":{}}`)
	empty := newTask()
	empty.Containers = nil
	h = newHost(t, testConfig(), empty)
	wantText(t, h.get(t, addrT, "/v3/task/stats"), 400, "Unable to get task stats for: "+arnT)
	wantText(t, h.get(t, addrT, "/v4/task/stats"), 500, "Unable to get task stats for: "+arnT)
}

// "self", or nothing, is the container that asks and its task, where the kernel proves it.
func TestSelf(t *testing.T) {
	h := newV4Host(t)
	for _, v := range []task.Version{task.V3, task.V4} {
		version := versionPath[v]
		for _, who := range []string{version[:3], version + "self"} {
			want(t, h.get(t, addrW, who), 200, typeJSON, shopDocument(v, 0))
			want(t, h.get(t, addrD, who), 200, typeJSON, shopDocument(v, 1))
			want(t, h.get(t, addrD, who+"/task"), 200, typeJSON, taskDocument(v, newShop()))
			want(t, h.get(t, addrD, who+"/taskWithTags"), 200, typeJSON, taskDocument(v, newShop()))
			want(t, h.get(t, addrD, who+"/stats"), 200, typeJSON, noSample[v])
			want(t, h.get(t, addrW, who+"/task/stats"), 200, typeJSON, h.get(t, addrU, version+endpointW+"/task/stats").body)
		}
	}
	want(t, h.get(t, addrD, "/v2/metadata/self"), 200, typeJSON, shopDocument(task.V2, 1))
	want(t, h.get(t, addrD, "/v2/stats/self"), 200, typeJSON, "null")
	// A is the only one of T that can have sent it: the pause container asks for nothing.
	_, each := task.Render(newAwsvpc())
	want(t, h.get(t, addrT, "/v4"), 200, typeJSON, each[0][task.V4].String())
}

// Where nothing tells which container asks, the answer says so, and the task is told of all the
// same.
func TestSelfAmbiguous(t *testing.T) {
	tk := newAwsvpc()
	other := running(idD, "other")
	other.NetworkMode = "container:" + idP
	tk.Containers = append(tk.Containers, other)
	h := newHost(t, testConfig(), tk)
	const why = "more than one container of task '" + arnT +
		"' can have sent it from '127.1.0.2'"
	wantText(t, h.get(t, addrT, "/v4"), 404, "V4 container metadata handler: unable to get container ID from request: "+why)
	wantText(t, h.get(t, addrT, "/v3/self"), 404, "V3 container metadata handler: unable to get container ID from request: "+why)
	wantText(t, h.get(t, addrT, "/v4/self/stats"), 404, "V4 container stats handler: unable to get task arn from request: "+why)
	wantText(t, h.get(t, addrT, "/v2/metadata/self"), 404, "Unable to get container ID from request: "+why)
	wantText(t, h.get(t, addrT, "/v2/stats/self"), 404, "Unable to get container ID from request: "+why)
	want(t, h.get(t, addrT, "/v4/task"), 200, typeJSON, taskDocument(task.V4, tk))
	if r := h.get(t, addrT, "/v4/self/task/stats"); r.StatusCode != 200 {
		t.Errorf("got %d %s", r.StatusCode, r.body)
	}
}

// A source address that belongs to no task is told so, in the form of the version.
func TestSelfUnknown(t *testing.T) {
	h := newV4Host(t)
	const why = "unable to associate '127.1.0.9' with task"
	wantText(t, h.get(t, addrU, "/v4"), 404, "V4 container metadata handler: unable to get container ID from request: "+why)
	wantText(t, h.get(t, addrU, "/v3/task"), 404, "V3 task metadata handler: unable to get task arn from request: "+why)
	wantText(t, h.get(t, addrU, "/v4/task/stats"), 404, "V4 task stats handler: unable to get task arn from request: "+why)
	wantText(t, h.get(t, addrU, "/v4/containers/web/stats"), 404, "V4 container stats handler: unable to get task arn from request: "+why)
	wantText(t, h.get(t, addrU, "/v2/stats/self"), 400, "Unable to get task arn from request: "+why)
}

// A name is that of a container in the task that asks: in the task definition, or else Docker's.
func TestNames(t *testing.T) {
	h := newV4Host(t)
	for _, name := range []string{"db", "shop-db-1"} {
		want(t, h.get(t, addrW, "/v4/containers/"+name), 200, typeJSON, shopDocument(task.V4, 1))
		want(t, h.get(t, addrW, "/v3/containers/"+name), 200, typeJSON, shopDocument(task.V3, 1))
		want(t, h.get(t, addrW, "/v4/containers/"+name+"/task"), 200, typeJSON, taskDocument(task.V4, newShop()))
		want(t, h.get(t, addrW, "/v4/containers/"+name+"/stats"), 200, typeJSON, "{}")
	}
	want(t, h.get(t, addrT, "/v4/containers/~internal~ecs~pause/stats"), 200, typeJSON, "{}")
	// another task's, nobody's, no names
	for _, name := range []string{"app", "other", "web2", endpointW, idW} {
		wantText(t, h.get(t, addrW, "/v4/containers/"+name), 404,
			"V4 container metadata handler: unable to get container ID from "+
				"request: task '"+arnShop+"' has no container '"+name+"'")
	}
}

// A container whose endpoint id is one of the words of the paths does not answer for the others.
func TestWordsAreNoIDs(t *testing.T) {
	tk := newOther()
	words := []string{"self", "task", "stats", "tasks", "taskWithTags"}
	for i, word := range words {
		c := running(fmt.Sprintf("%064x", i+1), word)
		c.EndpointID, c.Labels = word, map[string]string{"k": "thief"}
		tk.Containers = append(tk.Containers, c)
	}
	h := newHost(t, testConfig(), newShop(), tk)
	for _, word := range words {
		for _, form := range []string{"", "/task", "/stats", "/task/stats"} {
			lacks(t, h.get(t, addrW, "/v4/"+word+form).body, "thief")
		}
	}
}

// With OwnIDsOnly an id is good for its own task alone.
func TestOwnIDsOnly(t *testing.T) {
	h := newV4Host(t, func(c *Config) { c.OwnIDsOnly = true })
	want(t, h.get(t, addrW, "/v4/"+endpointD), 200, typeJSON, shopDocument(task.V4, 1)) // a sibling's
	for _, from := range []netip.Addr{addrT, addrU} {
		wantText(t, h.get(t, from, "/v4/"+endpointD), 404, strings.Replace(v3Container, "V3", "V4", 1)+endpointD)
		if r := h.get(t, from, "/v3/"+endpointD+"/task/stats"); r.StatusCode != 400 {
			t.Errorf("got %d %s", r.StatusCode, r.body)
		}
	}
}

// An id that two containers have is neither's.
func TestCopiedID(t *testing.T) {
	tk := newOther()
	tk.Containers[0].EndpointID = endpointW
	h := newHost(t, testConfig(), newShop(), tk)
	if r := h.get(t, addrW, "/v4/"+endpointW); r.StatusCode != 404 {
		t.Errorf("got %d %s", r.StatusCode, r.body)
	}
	want(t, h.get(t, addrW, "/v4"), 200, typeJSON, shopDocument(task.V4, 0))
}

// A container with the label sees every task of the host; its id in another's hands shows nothing.
func TestHostTasks(t *testing.T) {
	tk := newShop()
	tk.Containers[0].Labels = map[string]string{LabelHostTasks: "true"}
	tk.Containers[1].Labels = map[string]string{LabelHostTasks: "false"}
	h := newHost(t, testConfig(), tk, newAwsvpc(), newOther())
	all := "[" + taskDocument(task.V4, newAwsvpc()) + "," + taskDocument(task.V4, tk) + "," +
		taskDocument(task.V4, newOther()) + "]"
	a, w := string(v4Sample(idA).JSON), string(v4Sample(idW).JSON)
	stats := `{"` + idA + `":` + a + `,"` + idP + `":{},"` + idW + `":` + w + `,"` + idD +
		`":{},"` + idB + `":{}}`
	for _, who := range []string{"/v4", "/v4/self", "/v4/containers/web", "/v4/" + endpointW} {
		want(t, h.get(t, addrW, who+"/tasks"), 200, typeJSON, all)
		want(t, h.get(t, addrW, who+"/tasks/stats"), 200, typeJSON, stats)
	}
	for _, from := range []netip.Addr{addrD, addrT, addrU} {
		for _, who := range []string{"/v4", "/v4/self", "/v4/" + endpointD} {
			want(t, h.get(t, from, who+"/tasks"), 404, typeText, "404 page not found\n")
			want(t, h.get(t, from, who+"/tasks/stats"), 404, typeText, "404 page not found\n")
		}
	}
	for _, from := range []netip.Addr{addrT, addrU} { // not the id's task
		want(t, h.get(t, from, "/v4/"+endpointW+"/tasks"), 404, typeText, "404 page not found\n")
	}
	want(t, h.get(t, addrW, "/v3/self/tasks"), 404, typeText, "404 page not found\n")
}
