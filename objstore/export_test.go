package objstore

import "time"

// Shrink makes the sizes and times small that tests could not reach otherwise.
func (p *Proxy) Shrink(upstreamPut, part int64, keepAlive time.Duration) {
	p.limits = limits{upstreamPut: upstreamPut, upstreamPart: part, keepAlive: keepAlive}
}
