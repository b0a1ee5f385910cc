package bpf

// Go's names for what is generated from the C.
type (
	TaskValue    = MetadTaskValue    // of ip_task
	TaskCounters = MetadTaskCounters // of counters, one for each CPU
	Neighbour    = MetadNeighbour    // of neighbours
	VerdictCount = MetadVerdictCount // of verdicts, one for each CPU
	Event        = MetadEvent        // a record of events
	Objects      = MetadObjects
	Programs     = MetadPrograms
)

// Tags, as an accepted socket's SO_MARK has them; all others are tasks'.
const (
	TagNone = uint32(MetadTagTAG_NONE) // seen on a bridge device only: nothing is proved
	TagPort = uint32(MetadTagTAG_PORT) // the bit: no task yet, the other bits are the port's ifindex
)

// The program array's slots, in the order in which the kernel empties them, and the number of verdicts.
const (
	SlotBridge   = uint32(MetadSlotSLOT_BRIDGE)
	SlotPort     = uint32(MetadSlotSLOT_PORT)
	SlotCount    = uint32(MetadSlotSLOT_COUNT)
	VerdictLimit = int(MetadVerdictVERDICT_COUNT)
)
