package docker

import (
	"context"
	"fmt"
	"net/netip"
	"slices"

	"github.com/containerd/errdefs"
	"github.com/docker/docker/api/types/network"

	"metad/pkg/task"
)

// gatewayNetwork is the network through which containers on an overlay network reach other
// addresses. The Engine connects them to it without listing it among a container's networks.
const gatewayNetwork = "docker_gwbridge"

// look takes a look at a container for the inspector.
func (f *Follower) look(ctx context.Context, l *finding) {
	if l.inspected {
		if l.desc, l.err = f.inspect(ctx, l.id, l.desc); l.err != nil {
			return
		}
	}
	c := l.desc.container
	if pid := max(c.PID, l.newborn); pid != 0 {
		l.cgroup = f.cgroupOf(pid, l.id)
	}
	switch {
	case l.newborn != 0 && l.desc.startsWithNetwork():
		c.PID = l.newborn
	case !l.desc.ownNetwork():
		return
	}
	if l.ns, l.nsErr = f.read(&c); l.nsErr == nil && len(l.ns.unclaimed) > 0 {
		l.nsErr = f.addGateway(ctx, l.id, l.ns)
	}
}

// inspect inspects a container. before is its last description, nil if there was none.
func (f *Follower) inspect(ctx context.Context, id string, before *description) (*description,
	error) {
	var health *task.Health
	if before != nil {
		health = before.container.Health
	}
	inspect, err := f.cfg.Engine.ContainerInspect(ctx, id)
	if err != nil {
		return nil, err
	}
	if inspect.Config == nil || inspect.ContainerJSONBase == nil {
		return describe(&inspect, f.state.names, health, f.now())
	}
	all := inspect.Config.Labels
	own, err := f.images.withoutInherited(ctx, inspect.Image, all)
	if err != nil {
		return nil, err
	}
	inspect.Config.Labels = own
	d, err := describe(&inspect, f.state.names, health, f.now())
	if err != nil {
		return nil, err
	}
	d.container.Labels = shownLabels(all, own)
	d.intern()
	return d, nil
}

// addGateway adds the address that the gateway network has given the container, if any. It comes
// from the Engine, because a container that may administer its network can take any address.
func (f *Follower) addGateway(ctx context.Context, id string, ns *namespace) error {
	gateway, err := f.cfg.Engine.NetworkInspect(ctx, gatewayNetwork, network.InspectOptions{})
	switch {
	case errdefs.IsNotFound(err):
		return nil
	case err != nil:
		return fmt.Errorf("inspect network %s: %w", gatewayNetwork, err)
	}
	given, err := netip.ParsePrefix(gateway.Containers[id].IPv4Address)
	if err != nil {
		return nil // it is not connected to it
	}
	for _, ep := range ns.unclaimed {
		if ep.Addr == given.Addr() {
			ns.endpoints = append(ns.endpoints, ep)
		}
	}
	slices.SortFunc(ns.endpoints, compareEndpoints)
	return nil
}
