package docker

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"

	"github.com/containerd/errdefs"
)

// Labels with these prefixes name the task of a container.
var groupingFamilies = []string{"com.amazonaws.ecs.", "com.docker.compose."}

// rightsFamily is the prefix of labels that give a right, for example to see all tasks of the host.
const rightsFamily = "metad."

// images caches the labels of images that must not decide. An image id never changes its meaning,
// so each image is inspected once. Safe for concurrent use.
type images struct {
	engine Engine

	mu     sync.Mutex // guards what follows
	labels map[string]map[string]string
}

// withoutInherited returns the labels of a container that were set at its creation. The Engine
// mixes an image's labels into the container's, and an image must not choose the task.
//
// If a label has the image's value, it is not known whether the creation set it too. But the ECS
// agent and Compose set several labels of their family, and an image cannot have the right value
// of all of them: it has no task's ARN, and no hash of a configuration that names it. So a family
// counts if one label of it is not the image's. Labels that begin with "metad." count one by one:
// the creation must give the right, with a value that the image does not have.
func (im *images) withoutInherited(ctx context.Context, image string,
	labels map[string]string) (map[string]string, error) {
	if len(family(labels, groupingFamilies...))+len(family(labels, rightsFamily)) == 0 {
		return labels, nil
	}
	inherited, err := im.of(ctx, image)
	if err != nil {
		return nil, err
	}
	for _, prefix := range groupingFamilies {
		own := family(labels, prefix)
		ofImage := family(inherited, prefix)
		maps.DeleteFunc(own, func(k, v string) bool {
			was, ok := ofImage[k]
			return ok && was == v
		})
		if len(own) > 0 || len(ofImage) == 0 {
			continue
		}
		labels = maps.Clone(labels)
		maps.DeleteFunc(labels, func(k, _ string) bool {
			return strings.HasPrefix(k, prefix)
		})
	}
	if rights := family(inherited, rightsFamily); len(rights) > 0 {
		labels = maps.Clone(labels)
		maps.DeleteFunc(labels, func(k, v string) bool {
			was, ok := rights[k]
			return ok && was == v
		})
	}
	return labels, nil
}

// shownLabels returns a container's labels as its documents show them: all of them, except rights
// that only the image has. own is the result of withoutInherited.
func shownLabels(all, own map[string]string) map[string]string {
	if len(all) == len(own) {
		return all
	}
	all = maps.Clone(all)
	maps.DeleteFunc(all, func(k, _ string) bool {
		_, ok := own[k]
		return !ok && strings.HasPrefix(k, rightsFamily)
	})
	return all
}

// of returns the labels of an image that must not decide. The Engine keeps the image of a running
// container; an image that is gone has no labels.
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
		labels = family(image.Config.Labels, append(slices.Clip(groupingFamilies),
			rightsFamily)...)
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
