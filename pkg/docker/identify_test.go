package docker

import (
	"testing"

	"metad/pkg/task"
)

// What is said of a container before it is there is what is said of it later.
func TestIdentify(t *testing.T) {
	f := &Follower{state: &state{names: newNaming("us-west-2", "1", "blue")}}
	check := func(labels map[string]string, wantARN, wantName string) {
		t.Helper()
		tk, c := f.Identify(labels, "given")
		if wantARN == "" {
			if tk != nil || c != nil {
				t.Errorf("%v: got %+v", labels, tk)
			}
			return
		}
		if tk == nil || tk.ARN != wantARN || c.Name != wantName || c.DockerName != "given" {
			t.Errorf("%v: got %+v, %+v", labels, tk, c)
		}
		later := &description{container: task.Container{ID: "0123456789", Labels: labels,
			DockerName: "given"}}
		if later.identify(f.state.names); later.arn != wantARN ||
			later.container.Name != wantName {
			t.Errorf("%v: later it is %s, %s", labels, later.arn, later.container.Name)
		}
	}
	check(nil, "", "")
	check(map[string]string{labelComposeProject: "shop", labelComposeService: "web"}, "arn:aws:ecs:us-west-2:1:task/blue/shop", "web")
	check(map[string]string{labelComposeProject: "../x", labelComposeService: "web"}, "", "")
	check(map[string]string{task.LabelTaskARN: "arn:aws:ecs:us-west-2:1:task/c/158d", task.LabelContainerName: "app"}, "arn:aws:ecs:us-west-2:1:task/c/158d", "app")
	check(map[string]string{task.LabelTaskARN: "arn:x", task.LabelContainerName: "app"}, "", "")
}
