package main

import (
	"cmp"
	"net"
	"net/netip"
	"time"

	"metad/pkg/admin"
	"metad/pkg/loader"
)

func (d *daemon) adminConfig() admin.Config {
	cfg := d.cfg.adminConfig()
	cfg.Tasks = func(stats bool) admin.Tasks {
		var asked map[netip.Addr]loader.TaskCounters
		if stats {
			// the rest is worth as much without them
			asked, _ = d.own.loader.Counters()
		}
		return d.shown(stats, asked)
	}
	cfg.Ready = func() error {
		return cmp.Or(d.tasks.ready(), d.follower.Ready(), d.own.loader.Ready())
	}
	cfg.Collectors = d.collectors()
	cfg.Containers, cfg.Private = d.containers, d.looks()
	return cfg
}

// shown returns the answer of /tasks. asked has the kernel's counters of each address. A client
// that reads statistics keeps all containers hot, as one that reads metrics does.
func (d *daemon) shown(stats bool, asked map[netip.Addr]loader.TaskCounters) admin.Tasks {
	out := admin.Tasks{Version: version, Tasks: []admin.Task{}}
	for _, v := range d.tasks.table.Views() {
		t := v.Task
		at := admin.Task{ARN: t.ARN, ID: t.ID, Family: t.Family, Revision: t.Revision,
			Status: string(t.KnownStatus), Tag: v.Tag,
			Endpoints: []admin.Endpoint{}, Containers: []admin.Container{}}
		for _, ep := range t.Endpoints {
			at.Endpoints = append(at.Endpoints, admin.Endpoint{
				Address: ep.Addr.String(),
				MAC:     net.HardwareAddr(ep.MAC[:]).String(), Ifindex: ep.Ifindex,
				Container: ep.Container, Connections: asked[ep.Addr].Connections})
		}
		for i := range v.Containers {
			c := v.Containers[i].Container
			ac := admin.Container{ID: c.ID, Name: c.Name, Type: string(c.Type),
				Status: string(c.KnownStatus)}
			ac.Number = v.Number(&v.Containers[i])
			ac.File, ac.URIs = d.inject.Ways(c)
			if stats && c.Stats != nil {
				c.Stats.Ask(time.Now().UnixNano())
				if s := c.Stats.Load(); s != nil {
					ac.Stats = s.JSON
				}
			}
			at.Containers = append(at.Containers, ac)
		}
		out.Tasks = append(out.Tasks, at)
	}
	return out
}
