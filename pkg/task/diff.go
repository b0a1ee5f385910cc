package task

import "iter"

// Diff yields the tasks in which the sets before and after differ, by ARN: the old and the new
// task, nil if there is none. Both sets are ordered by ARN and have each ARN once. A task whose
// pointer is in both costs a comparison of pointers.
func Diff(before, after []*Task) iter.Seq2[*Task, *Task] {
	return func(yield func(was, is *Task) bool) {
		i, j := 0, 0
		for i < len(before) || j < len(after) {
			var was, is *Task
			switch {
			case i == len(before):
				is = after[j]
			case j == len(after):
				was = before[i]
			case before[i] == after[j]:
				i++
				j++
				continue
			default:
				if before[i].ARN <= after[j].ARN {
					was = before[i]
				}
				if after[j].ARN <= before[i].ARN {
					is = after[j]
				}
			}
			if was != nil {
				i++
			}
			if is != nil {
				j++
			}
			if !yield(was, is) {
				return
			}
		}
	}
}
