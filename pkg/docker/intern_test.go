package docker

import (
	"reflect"
	"strings"
	"testing"
	"unsafe"

	"metad/pkg/task"
)

// What two containers have in common is in memory once, and says what it said.
func TestIntern(t *testing.T) {
	made := func() *description {
		d := &description{identity: identity{arn: strings.Clone("arn:1")}}
		d.container = task.Container{Image: strings.Clone("busybox"),
			Labels: map[string]string{strings.Clone("team"): strings.Clone("platform")}}
		return d
	}
	a, b, want := made(), made(), made()
	a.intern()
	b.intern()
	if !reflect.DeepEqual(a, want) {
		t.Errorf("got %+v, want %+v", a, want)
	}
	same := func(what, x, y string) {
		if unsafe.StringData(x) != unsafe.StringData(y) {
			t.Errorf("%s %q is there twice", what, x)
		}
	}
	same("ARN", a.arn, b.arn)
	same("image", a.container.Image, b.container.Image)
	same("label", a.container.Labels["team"], b.container.Labels["team"])
}
