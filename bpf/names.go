package bpf

// Go's names for what is generated from the C.
type (
	TaskValue      = MetadTaskValue      // of ip_task
	ContainerValue = MetadContainerValue // of container_cgroup and host_cgroup
	TaskCounters   = MetadTaskCounters   // of counters, one for each CPU
	Handshake      = MetadHandshake      // of handshakes
	Neighbour      = MetadNeighbour      // of neighbours and port_neighbours
	NeighbourPlace = MetadNeighbourPlace // key of port_neighbours
	VerdictCount   = MetadVerdictCount   // of verdicts, one for each CPU
	Event          = MetadEvent          // a record of events
	Objects        = MetadObjects
	Programs       = MetadPrograms
)

// Tags, as an accepted socket's SO_MARK has them. A tag without TagPort numbers a task by its
// TagTask bits and, if any of its TagContainer bits is set, a container of that task.
const (
	TagTask      = uint32(MetadTagTAG_TASK)
	TagContainer = uint32(MetadTagTAG_CONTAINER)
	TagNone      = uint32(MetadTagTAG_NONE) // seen on a bridge device only: nothing is proved
	// the bit: no task yet, the other bits are the port's ifindex
	TagPort = uint32(MetadTagTAG_PORT)
)

// The program array's slots, in the order in which the kernel empties them, and the number of
// verdicts.
const (
	SlotBridge   = uint32(MetadSlotSLOT_BRIDGE)
	SlotPort     = uint32(MetadSlotSLOT_PORT)
	SlotCount    = uint32(MetadSlotSLOT_COUNT)
	VerdictLimit = int(MetadVerdictVERDICT_COUNT)
)

// Containers is how many containers of a task can have a number: 1 to Containers.
const Containers = int(TagContainer >> containerShift)

const containerShift = 24 // the lowest bit of TagContainer

// ContainerTag returns the tag of the task's container with number n, from 1.
func ContainerTag(task uint32, n int) uint32 { return task | uint32(n)<<containerShift }

// ContainerNumber returns the number of the container that tag names; 0: the task only.
func ContainerNumber(tag uint32) int { return int(tag & TagContainer >> containerShift) }
