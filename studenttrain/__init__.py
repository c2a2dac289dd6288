"""The trainer: any number of students from a store of soft targets, the teacher never loaded."""
