package cadvisor

import (
	"strconv"

	"metad/pkg/stats"
)

// family is one metric of all containers.
type family struct {
	name, kind, help string
	lines            func(dst []byte, p *page, f *family, r *row) []byte
}

// The kinds of metrics.
const (
	counter = "counter"
	gauge   = "gauge"
)

// families are what a page has. Names, kinds and units are cAdvisor's (metrics/prometheus.go).
var families = []family{
	{"container_cpu_usage_seconds_total", counter, "Cumulative cpu time consumed in seconds.",
		labelled(`,cpu="total"`, seconds(func(r *row) uint64 { return r.cpu.Total }))},
	{"container_cpu_user_seconds_total", counter,
		"Cumulative user cpu time consumed in seconds.",
		one(seconds(func(r *row) uint64 { return r.cpu.User }))},
	{"container_cpu_system_seconds_total", counter,
		"Cumulative system cpu time consumed in seconds.",
		one(seconds(func(r *row) uint64 { return r.cpu.Kernel }))},
	{"container_cpu_cfs_periods_total", counter,
		"Number of elapsed enforcement period intervals.",
		limited(whole(func(r *row) uint64 { return r.cpu.Periods }))},
	{"container_cpu_cfs_throttled_periods_total", counter,
		"Number of throttled period intervals.",
		limited(whole(func(r *row) uint64 { return r.cpu.ThrottledPeriods }))},
	{"container_cpu_cfs_throttled_seconds_total", counter,
		"Total time duration the container has been throttled.",
		limited(seconds(func(r *row) uint64 { return r.cpu.ThrottledTime }))},

	{"container_memory_usage_bytes", gauge,
		"Memory in use in bytes, whenever it was last touched.",
		one(whole(func(r *row) uint64 { return r.usage }))},
	{"container_memory_working_set_bytes", gauge,
		"Memory in use less inactive page cache, in bytes.",
		one(whole(func(r *row) uint64 { return r.usage - min(r.usage, r.inactive) }))},
	{"container_memory_cache", gauge, "Page cache in bytes.",
		one(whole(func(r *row) uint64 { return r.cache }))},
	{"container_memory_rss", gauge, "Anonymous memory in bytes.",
		one(whole(func(r *row) uint64 { return r.rss }))},
	{"container_memory_mapped_file", gauge, "Memory mapped files in bytes.",
		one(whole(func(r *row) uint64 { return r.mapped }))},
	{"container_memory_swap", gauge, "Swap in use in bytes. With cgroup v1 only.",
		onV1(whole(func(r *row) uint64 { return r.swap }))},
	{"container_memory_max_usage_bytes", gauge,
		"The most memory that was in use, in bytes. With cgroup v1 only.",
		onV1(whole(func(r *row) uint64 { return r.maxUsage }))},
	{"container_memory_failcnt", counter,
		"How often memory usage hit its limit. With cgroup v1 only.",
		onV1(whole(func(r *row) uint64 { return r.failcnt }))},
	{"container_oom_events_total", counter,
		"Processes killed because memory ran out, since the container's start.",
		only(func(r *row) bool { return r.hasKills },
			whole(func(r *row) uint64 { return r.oomKills }))},
	{"container_memory_failures_total", counter, "Page faults.", faults},

	{"container_network_receive_bytes_total", counter, "Bytes received.",
		each(func(n *stats.Network) uint64 { return n.RxBytes })},
	{"container_network_receive_packets_total", counter, "Packets received.",
		each(func(n *stats.Network) uint64 { return n.RxPackets })},
	{"container_network_receive_errors_total", counter, "Errors while receiving.",
		each(func(n *stats.Network) uint64 { return n.RxErrors })},
	{"container_network_receive_packets_dropped_total", counter,
		"Packets dropped while receiving.",
		each(func(n *stats.Network) uint64 { return n.RxDropped })},
	{"container_network_transmit_bytes_total", counter, "Bytes sent.",
		each(func(n *stats.Network) uint64 { return n.TxBytes })},
	{"container_network_transmit_packets_total", counter, "Packets sent.",
		each(func(n *stats.Network) uint64 { return n.TxPackets })},
	{"container_network_transmit_errors_total", counter, "Errors while sending.",
		each(func(n *stats.Network) uint64 { return n.TxErrors })},
	{"container_network_transmit_packets_dropped_total", counter,
		"Packets dropped while sending.",
		each(func(n *stats.Network) uint64 { return n.TxDropped })},

	{"container_fs_reads_bytes_total", counter, "Bytes read.",
		onDisk(func(r *row, d *disk) (uint64, bool) { return d.bytes[0], true })},
	{"container_fs_writes_bytes_total", counter, "Bytes written.",
		onDisk(func(r *row, d *disk) (uint64, bool) { return d.bytes[1], true })},
	{"container_fs_reads_total", counter, "Reads completed. With cgroup v1 only.",
		onDisk(func(r *row, d *disk) (uint64, bool) { return d.ops[0], r.v1 })},
	{"container_fs_writes_total", counter, "Writes completed. With cgroup v1 only.",
		onDisk(func(r *row, d *disk) (uint64, bool) { return d.ops[1], r.v1 })},

	{"container_threads", gauge, "Threads in the container.",
		one(whole(func(r *row) uint64 { return r.threads.Current }))},
	{"container_threads_max", gauge,
		"The most threads that are allowed in the container, 0: any number.",
		one(whole(func(r *row) uint64 { return unlimited(r.threads.Limit) }))},
	{"container_spec_memory_limit_bytes", gauge, "Memory limit of the container, 0: none.",
		one(whole(func(r *row) uint64 { return r.limit }))},
	{"container_spec_cpu_shares", gauge, "CPU shares of the container.",
		one(whole(func(r *row) uint64 { return r.shares }))},
	{"container_start_time_seconds", gauge,
		"Start time of the container since the Unix epoch in seconds.",
		one(whole(func(r *row) uint64 { return uint64(max(0, r.started.Unix())) }))},
	{"container_last_seen", gauge,
		"When the container's counters were last read, since the Unix epoch in seconds.",
		one(whole(func(r *row) uint64 { return uint64(max(0, r.read.Unix())) }))},
}

// unlimited is a limit as cAdvisor shows it: the kernel's largest number stands for none.
func unlimited(v uint64) uint64 {
	if v > 1<<62 {
		return 0
	}
	return v
}

// lines is how a family writes one container's series.
type lines = func(dst []byte, p *page, f *family, r *row) []byte

// value writes one number.
type value func(dst []byte, r *row) []byte

func whole(of func(*row) uint64) value {
	return func(dst []byte, r *row) []byte { return strconv.AppendUint(dst, of(r), 10) }
}

// seconds is for nanoseconds.
func seconds(of func(*row) uint64) value {
	return func(dst []byte, r *row) []byte { return appendSeconds(dst, of(r)) }
}

func appendSeconds(dst []byte, ns uint64) []byte {
	dst = strconv.AppendUint(dst, ns/1e9, 10)
	rest := ns % 1e9
	if rest == 0 {
		return dst
	}
	dst = append(dst, '.')
	for unit := uint64(1e8); rest > 0; unit /= 10 {
		dst = append(dst, '0'+byte(rest/unit))
		rest %= unit
	}
	return dst
}

func labelled(label string, v value) lines {
	return func(dst []byte, p *page, f *family, r *row) []byte {
		dst = p.begin(dst, f, r)
		dst = append(dst, label...)
		dst = v(append(dst, "} "...), r)
		return p.end(dst, r)
	}
}

func one(v value) lines { return labelled("", v) }

// only is one for the rows that have the number at all.
func only(has func(*row) bool, v value) lines {
	write := one(v)
	return func(dst []byte, p *page, f *family, r *row) []byte {
		if !has(r) {
			return dst
		}
		return write(dst, p, f, r)
	}
}

// limited is for what only containers with a CPU limit have.
func limited(v value) lines { return only(func(r *row) bool { return r.cpu.Periods > 0 }, v) }
func onV1(v value) lines    { return only(func(r *row) bool { return r.v1 }, v) }

func faults(dst []byte, p *page, f *family, r *row) []byte {
	for kind, n := range [...]uint64{r.faults, r.bigFaults} {
		dst = p.begin(dst, f, r)
		dst = append(dst, `,failure_type="`...)
		dst = append(dst, [...]string{"pgfault", "pgmajfault"}[kind]...)
		dst = append(dst, `",scope="hierarchy"} `...)
		dst = p.end(strconv.AppendUint(dst, n, 10), r)
	}
	return dst
}

func each(of func(*stats.Network) uint64) lines {
	return func(dst []byte, p *page, f *family, r *row) []byte {
		for i := range r.networks {
			dst = p.begin(dst, f, r)
			dst = append(dst, `,interface="`...)
			dst = appendEscaped(dst, r.networks[i].Name)
			dst = append(dst, `"} `...)
			dst = p.end(strconv.AppendUint(dst, of(&r.networks[i]), 10), r)
		}
		return dst
	}
}

func onDisk(of func(*row, *disk) (uint64, bool)) lines {
	return func(dst []byte, p *page, f *family, r *row) []byte {
		for i := range r.disks {
			n, known := of(r, &r.disks[i])
			if !known {
				continue
			}
			dst = p.begin(dst, f, r)
			dst = append(dst, `,device="`...)
			dst = appendEscaped(dst, p.deviceName(r.disks[i].device))
			dst = append(dst, `"} `...)
			dst = p.end(strconv.AppendUint(dst, n, 10), r)
		}
		return dst
	}
}

// begin writes a series' name and the container's labels.
func (p *page) begin(dst []byte, f *family, r *row) []byte {
	dst = append(append(dst, f.name...), '{')
	return append(dst, p.text[r.labels.start:r.labels.end]...)
}

// end writes the time of the counters, as cAdvisor does: rates are right whenever the page is read.
func (p *page) end(dst []byte, r *row) []byte {
	return append(dst, p.text[r.stamp.start:r.stamp.end]...)
}
