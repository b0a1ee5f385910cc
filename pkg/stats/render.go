package stats

import (
	"strconv"
	"time"
	"unicode/utf8"
)

// zeroCPU is precpu_stats of a first sample, as the Engine prints it.
const zeroCPU = `{"cpu_usage":{"total_usage":0,"usage_in_kernelmode":0,"usage_in_usermode":0},` +
	`"throttling_data":{"periods":0,"throttled_periods":0,"throttled_time":0}}`

var blkioKeys = [8]string{
	"io_service_bytes_recursive", "io_serviced_recursive", "io_queue_recursive",
	"io_service_time_recursive",
	"io_wait_time_recursive", "io_merged_recursive", "io_time_recursive", "sectors_recursive",
}

// previous is what a sample needs of the one before: its time, its cpu_stats as printed, and its
// traffic. The zero value means that there was none.
type previous struct {
	read time.Time
	cpu  []byte
	net  traffic
}

// traffic is the bytes of all interfaces of a container. The zero value means that no interface is
// visible.
type traffic struct {
	known  bool
	rx, tx uint64
}

func trafficOf(nets []Network) (t traffic) {
	t.known = len(nets) > 0
	for i := range nets {
		t.rx += nets[i].RxBytes
		t.tx += nets[i].TxBytes
	}
	return t
}

// appendRates appends network_rate_stats, the traffic per second since prev, to the object in dst.
// It returns the object, and the length that it had before without its closing brace. There are no
// rates without two samples, nor after a counted interface has gone.
//
//	{…, "network_rate_stats": {"rx_bytes_per_sec": 12.5, "tx_bytes_per_sec": 0}}
func appendRates(dst []byte, c *Counters, prev previous) (_ []byte, v2 int) {
	v2 = len(dst) - 1
	now, seconds := trafficOf(c.Networks), c.Read.Sub(prev.read).Seconds()
	if !now.known || !prev.net.known || now.rx < prev.net.rx || now.tx < prev.net.tx ||
		prev.read.IsZero() || seconds <= 0 {
		return dst, v2
	}
	dst = append(dst[:v2], `,"network_rate_stats":{"rx_bytes_per_sec":`...)
	dst = strconv.AppendFloat(dst, float64(now.rx-prev.net.rx)/seconds, 'f', -1, 64)
	dst = append(dst, `,"tx_bytes_per_sec":`...)
	dst = strconv.AppendFloat(dst, float64(now.tx-prev.net.tx)/seconds, 'f', -1, 64)
	return append(dst, `}}`...), v2
}

// appendSample appends the Engine API's stats object to dst and returns it with the bounds of
// cpu_stats in it, which are the next sample's precpu_stats. The order of the keys, and which
// empty ones are omitted, is that of the Engine's types.StatsJSON (API 1.30 to 1.47).
//
//	{"read": RFC 3339, "preread": RFC 3339, "pids_stats": {}, "blkio_stats": {},
//	 "num_procs": 0, "storage_stats": {}, "cpu_stats": {}, "precpu_stats": {},
//	 "memory_stats": {}, "name": "/…", "id": "…", "networks": {}}
func appendSample(dst []byte, id, name string, c *Counters, prev previous) (
	_ []byte, cpuStart, cpuEnd int) {
	dst = append(dst, `{"read":"`...)
	dst = c.Read.UTC().AppendFormat(dst, time.RFC3339Nano)
	dst = append(dst, `","preread":"`...)
	dst = prev.read.UTC().AppendFormat(dst, time.RFC3339Nano)
	dst = append(dst, `","pids_stats":`...)
	dst = appendPids(dst, &c.Pids)
	dst = append(dst, `,"blkio_stats":`...)
	dst = appendBlkio(dst, &c.Blkio)
	dst = append(dst, `,"num_procs":0,"storage_stats":{},"cpu_stats":`...)
	cpuStart = len(dst)
	dst = appendCPU(dst, &c.CPU)
	cpuEnd = len(dst)
	dst = append(dst, `,"precpu_stats":`...)
	if prev.cpu == nil {
		dst = append(dst, zeroCPU...)
	} else {
		dst = append(dst, prev.cpu...)
	}
	dst = append(dst, `,"memory_stats":`...)
	dst = appendMemory(dst, &c.Memory)
	if name != "" {
		dst = append(dst, `,"name":`...)
		dst = appendString(dst, name)
	}
	if id != "" {
		dst = append(dst, `,"id":`...)
		dst = appendString(dst, id)
	}
	if len(c.Networks) > 0 {
		dst = append(dst, `,"networks":`...)
		dst = appendNetworks(dst, c.Networks)
	}
	return append(dst, '}'), cpuStart, cpuEnd
}

func appendPids(dst []byte, p *Pids) []byte {
	dst = append(dst, '{')
	if p.Current != 0 {
		dst = appendKey(dst, "current", p.Current)
	}
	if p.Limit != 0 {
		dst = appendKey(dst, "limit", p.Limit)
	}
	return append(dst, '}')
}

func appendBlkio(dst []byte, b *Blkio) []byte {
	for i, list := range b.lists() {
		if i == 0 {
			dst = append(dst, `{"`...)
		} else {
			dst = append(dst, `,"`...)
		}
		dst = append(dst, blkioKeys[i]...)
		dst = append(dst, `":`...)
		if *list == nil {
			dst = append(dst, "null"...)
			continue
		}
		dst = append(dst, '[')
		for j := range *list {
			e := &(*list)[j]
			if j > 0 {
				dst = append(dst, ',')
			}
			dst = append(dst, '{')
			dst = appendKey(dst, "major", e.Major)
			dst = appendKey(dst, "minor", e.Minor)
			dst = append(dst, `,"op":`...)
			dst = appendString(dst, e.Op)
			dst = appendKey(dst, "value", e.Value)
			dst = append(dst, '}')
		}
		dst = append(dst, ']')
	}
	return append(dst, '}')
}

func appendCPU(dst []byte, c *CPU) []byte {
	dst = append(dst, `{"cpu_usage":{`...)
	dst = appendKey(dst, "total_usage", c.Total)
	// The Engine lists every possible CPU, which may be more than exist. Clients that divide
	// by the length then get wrong numbers. So the list is printed only if its length is the
	// number of CPUs.
	if len(c.PerCPU) > 0 && uint64(len(c.PerCPU)) == uint64(c.Online) {
		dst = append(dst, `,"percpu_usage":[`...)
		for i, v := range c.PerCPU {
			if i > 0 {
				dst = append(dst, ',')
			}
			dst = strconv.AppendUint(dst, v, 10)
		}
		dst = append(dst, ']')
	}
	dst = appendKey(dst, "usage_in_kernelmode", c.Kernel)
	dst = appendKey(dst, "usage_in_usermode", c.User)
	dst = append(dst, '}')
	if c.System != 0 {
		dst = appendKey(dst, "system_cpu_usage", c.System)
	}
	if c.Online != 0 {
		dst = appendKey(dst, "online_cpus", uint64(c.Online))
	}
	dst = append(dst, `,"throttling_data":{`...)
	dst = appendKey(dst, "periods", c.Periods)
	dst = appendKey(dst, "throttled_periods", c.ThrottledPeriods)
	dst = appendKey(dst, "throttled_time", c.ThrottledTime)
	return append(dst, `}}`...)
}

func appendMemory(dst []byte, m *Memory) []byte {
	dst = append(dst, '{')
	if m.Usage != 0 {
		dst = appendKey(dst, "usage", m.Usage)
	}
	if m.MaxUsage != 0 {
		dst = appendKey(dst, "max_usage", m.MaxUsage)
	}
	if len(m.Stats) > 0 {
		if dst[len(dst)-1] != '{' {
			dst = append(dst, ',')
		}
		dst = append(dst, `"stats":{`...)
		for i := range m.Stats {
			if i > 0 {
				dst = append(dst, ',')
			}
			dst = appendString(dst, m.Stats[i].Key)
			dst = append(dst, ':')
			dst = strconv.AppendUint(dst, m.Stats[i].Value, 10)
		}
		dst = append(dst, '}')
	}
	if m.Failcnt != 0 {
		dst = appendKey(dst, "failcnt", m.Failcnt)
	}
	if m.Limit != 0 {
		dst = appendKey(dst, "limit", m.Limit)
	}
	return append(dst, '}')
}

func appendNetworks(dst []byte, nets []Network) []byte {
	dst = append(dst, '{')
	for i := range nets {
		n := &nets[i]
		if i > 0 {
			dst = append(dst, ',')
		}
		dst = appendString(dst, n.Name)
		dst = append(dst, `:{`...)
		dst = appendKey(dst, "rx_bytes", n.RxBytes)
		dst = appendKey(dst, "rx_packets", n.RxPackets)
		dst = appendKey(dst, "rx_errors", n.RxErrors)
		dst = appendKey(dst, "rx_dropped", n.RxDropped)
		dst = appendKey(dst, "tx_bytes", n.TxBytes)
		dst = appendKey(dst, "tx_packets", n.TxPackets)
		dst = appendKey(dst, "tx_errors", n.TxErrors)
		dst = appendKey(dst, "tx_dropped", n.TxDropped)
		dst = append(dst, '}')
	}
	return append(dst, '}')
}

// appendKey appends "key":v, with a comma before it unless it is the first of its object. key
// must need no escaping.
func appendKey(dst []byte, key string, v uint64) []byte {
	if dst[len(dst)-1] != '{' {
		dst = append(dst, ',')
	}
	dst = append(dst, '"')
	dst = append(dst, key...)
	dst = append(dst, `":`...)
	return strconv.AppendUint(dst, v, 10)
}

// appendString appends s as a JSON string, escaped as encoding/json does. An interface's name may
// hold anything but a slash and white space.
func appendString(dst []byte, s string) []byte {
	const hex = "0123456789abcdef"
	dst = append(dst, '"')
	for i := 0; i < len(s); {
		b := s[i]
		switch {
		case b >= utf8.RuneSelf:
			r, n := utf8.DecodeRuneInString(s[i:])
			switch {
			case r == utf8.RuneError && n == 1:
				dst = append(dst, `\ufffd`...)
			case r == '\u2028' || r == '\u2029':
				dst = append(dst, `\u202`...)
				dst = append(dst, hex[r&0xf])
			default:
				dst = append(dst, s[i:i+n]...)
			}
			i += n
			continue
		case b == '"' || b == '\\':
			dst = append(dst, '\\', b)
		case b == '\b':
			dst = append(dst, `\b`...)
		case b == '\f':
			dst = append(dst, `\f`...)
		case b == '\n':
			dst = append(dst, `\n`...)
		case b == '\r':
			dst = append(dst, `\r`...)
		case b == '\t':
			dst = append(dst, `\t`...)
		case b < ' ' || b == '<' || b == '>' || b == '&':
			dst = append(dst, `\u00`...)
			dst = append(dst, hex[b>>4], hex[b&0xf])
		default:
			dst = append(dst, b)
		}
		i++
	}
	return append(dst, '"')
}
