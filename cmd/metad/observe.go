package main

import (
	"cmp"
	"net"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"

	"metad/pkg/admin"
	"metad/pkg/fdbudget"
)

func (d *daemon) adminConfig() admin.Config {
	cfg := d.cfg.adminConfig()
	cfg.Tasks = d.shown
	cfg.Ready = func() error { return cmp.Or(d.tasks.ready(), d.follower.Ready(), d.own.loader.Ready()) }
	cfg.Collectors = []prometheus.Collector{
		collectors.NewGoCollector(),
		collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}),
		&metrics{d: d},
	}
	return cfg
}

// shown is what /tasks shows.
func (d *daemon) shown(stats bool) admin.Tasks {
	out := admin.Tasks{Version: version, Tasks: []admin.Task{}}
	for _, v := range d.tasks.table.Views() {
		t := v.Task
		at := admin.Task{ARN: t.ARN, ID: t.ID, Family: t.Family, Revision: t.Revision, Status: string(t.KnownStatus), Tag: v.Tag,
			Endpoints: []admin.Endpoint{}, Containers: []admin.Container{}}
		for _, ep := range t.Endpoints {
			at.Endpoints = append(at.Endpoints, admin.Endpoint{
				Address: ep.Addr.String(), MAC: net.HardwareAddr(ep.MAC[:]).String(), Ifindex: ep.Ifindex})
		}
		for _, c := range t.Containers {
			ac := admin.Container{ID: c.ID, Name: c.Name, Type: string(c.Type), Status: string(c.KnownStatus)}
			ac.File, ac.URIs = d.inject.Ways(c)
			if stats && c.Stats != nil {
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

// metrics reads the parts' counters when it is asked.
type metrics struct{ d *daemon }

var (
	descVerdicts = prometheus.NewDesc("metad_verdicts_total", "Packets by what the eBPF programs decided.", []string{"verdict"}, nil)
	descPorts    = prometheus.NewDesc("metad_ports", "Ports of the watched bridges that metad's program is attached to.", nil, nil)
	descPending  = prometheus.NewDesc("metad_ports_pending", "Ports that metad's program is still to be attached to after a start.", nil, nil)
	descUnhooked = prometheus.NewDesc("metad_devices_not_attached", "Ports and bridges that metad's program could not be attached to.", nil, nil)
	descUnwatch  = prometheus.NewDesc("metad_addresses_unwatched", "Task addresses behind devices that are no ports of watched bridges.", nil, nil)
	descAttach   = prometheus.NewDesc("metad_attach_errors_total", "Attachments that failed.", nil, nil)
	descTasks    = prometheus.NewDesc("metad_tasks", "Tasks known.", nil, nil)
	descProvable = prometheus.NewDesc("metad_containers", "Running containers, by whether the kernel tells which of them a connection comes from (proof=\"kernel\") or at best its address does (proof=\"address\").", []string{"proof"}, nil)
	descUnnamed  = prometheus.NewDesc("metad_callers_not_named_total", "Requests about the container that asks of which nothing told which it is: answered 404.", nil, nil)
	descConflict = prometheus.NewDesc("metad_address_conflicts_total", "Addresses that two ports began to claim.", nil, nil)
	descCopied   = prometheus.NewDesc("metad_endpoint_id_conflicts_total", "Endpoint ids refused because two containers held them.", nil, nil)
	descOpen     = prometheus.NewDesc("metad_connections", "Open connections from containers.", nil, nil)
	descRefused  = prometheus.NewDesc("metad_connections_refused_total", "Connections over a limit.", nil, nil)
	descDelayed  = prometheus.NewDesc("metad_requests_delayed_total", "Requests that waited because their client sent them before it had its answers.", nil, nil)
	descWaiting  = prometheus.NewDesc("metad_waiting_requests", "Requests from addresses whose task is not known yet.", nil, nil)
	descTurned   = prometheus.NewDesc("metad_waits_refused_total", "Requests that did not wait for their task because too many did.", nil, nil)
	descFallback = prometheus.NewDesc("metad_agent_fallbacks_total", "Metadata documents of metad's own in place of the ECS agent's, by reason: the agent is away, or does not know the id.", []string{"reason"}, nil)
	descPanics   = prometheus.NewDesc("metad_panics_total", "Requests answered 500 because of a bug.", nil, nil)
	descSamples  = prometheus.NewDesc("metad_samples_total", "Statistics samples by outcome.", []string{"outcome"}, nil)
	descKept     = prometheus.NewDesc("metad_descriptors_kept", "File descriptors that statistics keep open to save work.", nil, nil)
	descRoom     = prometheus.NewDesc("metad_descriptors_room", "File descriptors that may be kept: what connections and namespaces leave.", nil, nil)
	descDocker   = prometheus.NewDesc("metad_docker_connected", "1 while the Docker Engine's event stream is open.", nil, nil)
	descNRI      = prometheus.NewDesc("metad_nri_connected", "1 while the Docker Engine asks metad by NRI what to put into new containers.", nil, nil)
	descEvents   = prometheus.NewDesc("metad_docker_events_total", "Events received from the Docker Engine.", nil, nil)
	descInspects = prometheus.NewDesc("metad_docker_inspects_total", "Containers inspected.", nil, nil)
	descErrors   = prometheus.NewDesc("metad_docker_errors_total", "Inspects that failed, namespaces that could not be read, streams lost.", nil, nil)
)

// Describe implements prometheus.Collector.
func (m *metrics) Describe(ch chan<- *prometheus.Desc) { prometheus.DescribeByCollect(m, ch) }

// Collect implements prometheus.Collector.
func (m *metrics) Collect(ch chan<- prometheus.Metric) {
	counter := func(d *prometheus.Desc, v uint64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.CounterValue, float64(v), labels...)
	}
	gauge := func(d *prometheus.Desc, v int) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, float64(v))
	}
	if verdicts, err := m.d.own.loader.Verdicts(); err != nil {
		ch <- prometheus.NewInvalidMetric(descVerdicts, err)
	} else {
		for _, v := range verdicts {
			counter(descVerdicts, v.Packets, v.Name)
		}
	}
	l := m.d.own.loader.Status()
	gauge(descPorts, l.Ports)
	gauge(descPending, l.Pending)
	gauge(descUnhooked, l.NotAttached)
	gauge(descUnwatch, l.Unwatched)
	counter(descAttach, l.AttachErrors)
	gauge(descTasks, len(m.d.tasks.table.Views()))
	byKernel, byAddress := m.d.tasks.table.Provable()
	ch <- prometheus.MustNewConstMetric(descProvable, prometheus.GaugeValue, float64(byKernel), "kernel")
	ch <- prometheus.MustNewConstMetric(descProvable, prometheus.GaugeValue, float64(byAddress), "address")
	counter(descConflict, m.d.tasks.table.Conflicts())
	counter(descCopied, m.d.tasks.table.EndpointConflicts())
	counter(descTurned, m.d.tasks.table.TurnedAway())

	s := m.d.endpoint.counters()
	gauge(descOpen, s.Open)
	counter(descRefused, s.Refused)
	counter(descDelayed, s.Delayed)
	gauge(descWaiting, s.Waiting)
	counter(descFallback, s.AgentAway, "away")
	counter(descFallback, s.AgentDisowned, "unknown")
	counter(descPanics, s.Panics)
	counter(descUnnamed, s.Unnamed)

	st := m.d.sampler.Metrics()
	counter(descSamples, st.Samples.Load(), "rendered")
	counter(descSamples, st.Damaged.Load(), "damaged")
	counter(descSamples, st.Gone.Load(), "gone")
	counter(descSamples, st.Short.Load(), "no_descriptor")
	counter(descSamples, st.Failed.Load(), "failed")
	fds := fdbudget.Process().Usage()
	gauge(descKept, fds.Kept)
	gauge(descRoom, fds.Room)

	f := m.d.follower.Status()
	gauge(descDocker, number(f.Connected))
	gauge(descNRI, number(m.d.plugin != nil && m.d.plugin.Connected()))
	counter(descEvents, f.Events)
	counter(descInspects, f.Inspects)
	counter(descErrors, f.Errors)
}

// number is how a metric says yes or no.
func number(yes bool) int {
	if yes {
		return 1
	}
	return 0
}
