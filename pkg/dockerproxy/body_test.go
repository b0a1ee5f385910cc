package dockerproxy

import (
	"bytes"
	"encoding/json"
	"errors"
	"reflect"
	"slices"
	"strings"
	"testing"

	"metad/pkg/inject"
)

const (
	testEnv  = "ECS_CONTAINER_METADATA_FILE=/ecs/metadata/app/metadata.json"
	testBind = "/var/lib/ecs/data/metadata/default/158d/app:/ecs/metadata/app:ro"
)

// cliBody is what the docker command sends for
// docker run -d --name app -e A=1 -v /srv:/data:ro --memory 64m -p 8080:80 nginx, shortened.
const cliBody = `{"Hostname":"","Env":["A=1"],"Cmd":null,"Image":"nginx","Volumes":{},"Labels":{"a":"b"},` +
	`"ExposedPorts":{"80/tcp":{}},"HostConfig":{"Binds":["/srv:/data:ro"],"NetworkMode":"default",` +
	`"PortBindings":{"80/tcp":[{"HostIp":"","HostPort":"8080"}]},"VolumesFrom":null,"Memory":67108864,"MemorySwappiness":-1},` +
	`"NetworkingConfig":{"EndpointsConfig":{}}}` + "\n"

// adding is additions that find nothing to take out.
func adding(env, bind string) additions {
	return additions{env: []string{env}, bind: bind,
		ownVariable: func(string) bool { return false }, ownMount: func(inject.Mount) bool {
			return false
		}}
}

func targets(b *createBody) (all []string) {
	for _, m := range b.mounts {
		all = append(all, m.Target)
	}
	return all
}

// F18: what the user has stays as it is, ours is appended last; nothing else changes by a byte.
func TestBodyF18(t *testing.T) {
	f := func(body, want string) {
		t.Helper()
		b, err := parseCreate([]byte(body))
		if err != nil {
			t.Errorf("%s: %v", body, err)
			return
		}
		if got := string(b.with(adding("E=1", "/h:/c:ro"))); got != want {
			t.Errorf("got  %s\nwant %s", got, want)
		}
		if string(b.raw) != body {
			t.Errorf("the original has changed: %s", b.raw)
		}
	}
	f(cliBody, strings.NewReplacer(`"A=1"`, `"A=1","E=1"`, `"/srv:/data:ro"`, `"/srv:/data:ro","/h:/c:ro"`).Replace(cliBody))
	f(`{"Image":"i"}`, `{"Env":["E=1"],"HostConfig":{"Binds":["/h:/c:ro"]},"Image":"i"}`)
	f(`{"Image":"i","Env":null,"HostConfig":null}`, `{"Image":"i","Env":["E=1"],"HostConfig":{"Binds":["/h:/c:ro"]}}`)
	f(`{"HostConfig":{},"Env":[ ]}`, `{"HostConfig":{"Binds":["/h:/c:ro"]},"Env":[ "E=1"]}`)
	f(`{"HostConfig":{"Binds":null,"X":1},"Env":["E=0"]}`, `{"HostConfig":{"Binds":["/h:/c:ro"],"X":1},"Env":["E=0","E=1"]}`)
	f("\n{ \"env\" : [ \"a\" , \"b\" ] ,\"hostconfig\":{ \"BINDS\":[\n]} }\t", "\n{ \"env\" : [ \"a\" , \"b\" ,\"E=1\"] ,\"hostconfig\":{ \"BINDS\":[\n\"/h:/c:ro\"]} }\t")
	f(`{"Privileged":true,"HostConfig":{"X":1}}`, `{"Env":["E=1"],"Privileged":true,"HostConfig":{"Binds":["/h:/c:ro"],"X":1}}`)
	f(`{"Big":123456789012345678901234567890.1e5,"New":{"a":[1,{"Env":[]}]},"Image":"\u00fc\ud83d"}`,
		`{"Env":["E=1"],"HostConfig":{"Binds":["/h:/c:ro"]},"Big":123456789012345678901234567890.1e5,"New":{"a":[1,{"Env":[]}]},"Image":"\u00fc\ud83d"}`)
}

func TestBodyNotUnderstood(t *testing.T) {
	for _, body := range []string{
		`{"Image":"i","Binds":["/tmp:/mnt"],"Privileged":true}`, `{"Image":"i","networkMode":"none","HostConfig":null}`, `{"Image":"i","Cpuset":"0"}`,
		``, `null`, `[]`, `{}`, `"x"`, `{"Image":"i"`, `{"Image":"i",}`, `{"Image" "i"}`,
		`{"Env":"A=1"}`, `{"Env":{}}`, `{"HostConfig":[]}`, `{"HostConfig":{"Binds":"x"}}`, `{"Labels":[]}`,
		`{"Env":["a"],"Env":["b"]}`, `{"Env":["a"],"env":["b"]}`, `{"HostConfig":{},"Hostconfig":{}}`, `{"HostConfig":{"Binds":[],"binds":[]}}`,
	} {
		if _, err := parseCreate([]byte(body)); !errors.Is(err, errBody) {
			t.Errorf("%s: got %v", body, err)
		}
	}
}

func TestBodyTargets(t *testing.T) {
	b, err := parseCreate(
		[]byte(`{"Volumes":{"/v":{},"/ecs//x/":{}},"Env":["A","B=2"],"HostConfig":{` +
			`"Binds":["/a:/b","/a:/c:ro","name:/d","/anonymous","/s:/e/../ecs"],` +
			`"Mounts":[{"Type":"tmpfs","Target":"/m"},{"type":"volume","target":"/n"}],"Tmpfs":{"/t":""},"VolumesFrom":["c1:ro","c2"]}}`))
	if err != nil {
		t.Fatal(err)
	}
	if want := []string{"/anonymous", "/b", "/c", "/d", "/ecs", "/ecs/x", "/m", "/n", "/t",
		"/v"}; !slices.Equal(targets(b), want) {
		t.Errorf("targets: got %q, want %q", targets(b), want)
	}
	if want := []string{"c1:ro", "c2"}; !slices.Equal(b.volumesFrom, want) {
		t.Errorf("volumesFrom: got %q, want %q", b.volumesFrom, want)
	}
}

// What was in the body is in it afterwards, to the last digit, and ours is there, last.
func FuzzBody(f *testing.F) {
	f.Add([]byte(cliBody))
	f.Add([]byte(`{"Image":"i","Env":null,"HostConfig":null}`))
	f.Add([]byte(`{"env":[],"HOSTCONFIG":{"Binds":[ "a:b" ]},"N":1e400,"Ωſ":"\u017f"}`))
	f.Add([]byte(`{"HostConfig":{"Mounts":[{"Target":"/x"}]},"Env":["\ud800"]} {"more":1}`))
	f.Add([]byte(`{"a":1,"a":2}`))
	f.Fuzz(func(t *testing.T, body []byte) {
		b, err := parseCreate(body)
		if err != nil {
			return
		}
		out := b.with(adding(testEnv, testBind))
		if bytes.Equal(out, body) {
			t.Fatalf("nothing added: %s", out)
		}

		// What follows the object (the Engine may look at it or not) is the same.
		before, rest := decode(t, body)
		after, restAfter := decode(t, out)
		if rest != restAfter {
			t.Errorf("after the object: got %q, want %q", restAfter, rest)
		}

		env := take(t, after, "Env")
		if !reflect.DeepEqual(env, append(listOf(take(t, before, "Env")), any(testEnv))) {
			t.Errorf("Env: got %v", env)
		}
		host, _ := take(t, after, "HostConfig").(map[string]any)
		oldHost, _ := take(t, before, "HostConfig").(map[string]any)
		binds := take(t, host, "Binds")
		if !reflect.DeepEqual(binds, append(listOf(take(t, oldHost, "Binds")),
			any(testBind))) {
			t.Errorf("Binds: got %v", binds)
		}
		if len(host)+len(oldHost) > 0 && !reflect.DeepEqual(host, oldHost) {
			t.Errorf("HostConfig: got %v, want %v", host, oldHost)
		}
		if !reflect.DeepEqual(after, before) {
			t.Errorf("got %v, want %v", after, before)
		}
		// The Engine reads both members as parseCreate did.
		again, err := parseCreate(out)
		if err != nil || !slices.Contains(again.env, testEnv) ||
			!slices.Contains(targets(again), "/ecs/metadata/app") {
			t.Errorf("read again: %v", err)
		}
	})
}

func decode(t *testing.T, b []byte) (map[string]any, string) {
	t.Helper()
	dec := json.NewDecoder(bytes.NewReader(b))
	dec.UseNumber()
	var v map[string]any
	if err := dec.Decode(&v); err != nil {
		t.Fatalf("%v: %s", err, b)
	}
	return v, string(b[dec.InputOffset():])
}

// take removes the member called name in any case and returns it.
func take(t *testing.T, m map[string]any, name string) any {
	t.Helper()
	for k, v := range m {
		if strings.EqualFold(k, name) {
			delete(m, k)
			return v
		}
	}
	return nil
}

func listOf(v any) []any {
	l, _ := v.([]any)
	return l
}
