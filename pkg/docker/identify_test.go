package docker

import (
	"testing"

	"metad/pkg/task"
)

func TestIdentify(t *testing.T) {
	f := &Follower{names: newNaming("eu-west-1", "111122223333", "prod")}
	is := func(labels map[string]string, name, wantARN, wantName string) {
		t.Helper()
		tk, c := f.Identify(labels, name)
		switch {
		case wantARN == "" && tk == nil && c == nil:
		case tk == nil || c == nil || tk.ARN != wantARN || c.Name != wantName:
			t.Errorf("labels %v: got %+v %+v, want %q %q", labels, tk, c, wantARN, wantName)
		}
	}
	const arn = "arn:aws:ecs:us-west-2:111122223333:task/default/abc"
	is(map[string]string{task.LabelTaskARN: arn, task.LabelContainerName: "app"}, "x", arn, "app")
	is(map[string]string{labelComposeProject: "shop", labelComposeService: "web"}, "shop-web-1",
		"arn:aws:ecs:eu-west-1:111122223333:task/prod/shop", "web")
	is(nil, "lonely", "", "")
	is(map[string]string{task.LabelTaskARN: "nonsense"}, "x", "", "")
}
