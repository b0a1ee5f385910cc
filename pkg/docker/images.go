package docker

import (
	"context"
	"fmt"
	"maps"
	"strings"
	"sync"

	"github.com/containerd/errdefs"
)

// Labels with these beginnings say which task a container belongs to.
var groupingFamilies = []string{"com.amazonaws.ecs.", "com.docker.compose."}

// images knows the grouping labels that images carry. What an id stands for never changes, so that
// each image is asked for once. Safe for concurrent use.
type images struct {
	engine Engine

	mu     sync.Mutex // guards what follows
	labels map[string]map[string]string
}

// withoutInherited returns the labels of a container as far as they were set at its creation. The
// Engine mixes an image's labels into the container's, and whoever made the image must not choose
// the task.
//
// Whether a label was set to the very value that the image has cannot be seen. But the ECS agent
// and Compose set several labels of their family, and an image cannot have all of them right: it
// has no task's ARN, and no hash of a configuration that names it. So a family counts if one label
// of it is not the image's.
func (im *images) withoutInherited(ctx context.Context, image string, labels map[string]string) (map[string]string, error) {
	if len(family(labels, groupingFamilies...)) == 0 {
		return labels, nil
	}
	inherited, err := im.of(ctx, image)
	if err != nil {
		return nil, err
	}
	for _, prefix := range groupingFamilies {
		own := family(labels, prefix)
		ofImage := family(inherited, prefix)
		maps.DeleteFunc(own, func(k, v string) bool { was, ok := ofImage[k]; return ok && was == v })
		if len(own) > 0 || len(ofImage) == 0 {
			continue
		}
		labels = maps.Clone(labels)
		maps.DeleteFunc(labels, func(k, _ string) bool { return strings.HasPrefix(k, prefix) })
	}
	return labels, nil
}

// of returns the grouping labels of an image. The Engine removes no image of a container that runs;
// one that is gone has none.
func (im *images) of(ctx context.Context, id string) (map[string]string, error) {
	im.mu.Lock()
	labels, ok := im.labels[id]
	im.mu.Unlock()
	if ok {
		return labels, nil
	}
	image, err := im.engine.ImageInspect(ctx, id)
	switch {
	case errdefs.IsNotFound(err):
		return nil, nil
	case err != nil:
		return nil, fmt.Errorf("inspect image %s: %w", id, err)
	}
	labels = map[string]string{}
	if image.Config != nil {
		labels = family(image.Config.Labels, groupingFamilies...)
	}
	im.mu.Lock()
	defer im.mu.Unlock()
	const most = 4096 // images; more than that come and go, and are asked for again
	if im.labels == nil || len(im.labels) >= most {
		im.labels = map[string]map[string]string{}
	}
	im.labels[id] = labels
	return labels, nil
}

// family returns those labels that begin with one of the prefixes.
func family(labels map[string]string, prefixes ...string) map[string]string {
	some := map[string]string{}
	for k, v := range labels {
		for _, p := range prefixes {
			if strings.HasPrefix(k, p) {
				some[k] = v
			}
		}
	}
	return some
}
