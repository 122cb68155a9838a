// Package test holds the tests of the whole system and of the shape of the code: they may import
// everything, and nothing imports them.
package test
