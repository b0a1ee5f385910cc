package task

// AppendTask appends t's v2 metadata document to dst, as GET /v2/metadata answers it.
func AppendTask(dst []byte, t *Task) []byte { panic("not written yet") }

// AppendContainer appends c's v2 metadata document to dst, as GET /v2/metadata/<id> answers it.
func AppendContainer(dst []byte, c *Container) []byte { panic("not written yet") }
