// Package keypolicy holds the key policies that the documentation gives to the
// owners of keys, letter by letter, and compares policies. Pure text.
package keypolicy
