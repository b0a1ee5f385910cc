package docker

import "unique"

// intern makes those of d's texts one copy that other containers have too: a host of thousands of
// containers has few images, services and settings. A copy goes with the last container that has
// it.
func (d *description) intern() {
	one := func(text string) string { return unique.Make(text).Value() }
	c := &d.container
	for _, text := range []*string{&d.arn, &d.id, &d.cluster, &d.family, &d.revision,
		&d.cgroupParent,
		&c.Name, &c.Image, &c.ImageID, &c.LogDriver, &c.State, &c.NetworkMode} {
		*text = one(*text)
	}
	for _, texts := range []*map[string]string{&c.Labels, &c.LogOptions} {
		if len(*texts) == 0 {
			continue
		}
		all := make(map[string]string, len(*texts))
		for k, v := range *texts {
			all[one(k)] = one(v)
		}
		*texts = all
	}
}
